// The simulated devices: which there are, whose turn it is, their memory, and their random numbers.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>

#include <atomic>
#include <mutex>
#include <sstream>
#include <unordered_set>

namespace npu_sim {

constexpr auto NPU = c10::DeviceType::PrivateUse1;

// ---------------------------------------------------------------- which devices there are

// The machine's device behind each index.
inline std::vector<int> read_devices() {
  const char* count = std::getenv("NPU_SIM_DEVICES");
  const int there = count ? std::atoi(count) : 8;
  std::vector<int> devices;
  const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible) {
    for (int i = 0; i < there; i++) devices.push_back(i);
    return devices;
  }
  std::istringstream list(visible);
  for (std::string entry; std::getline(list, entry, ',');) {
    const bool number = !entry.empty() && entry.find_first_not_of("0123456789") == std::string::npos;
    if (!number) break;  // what follows is not read
    const int device = std::atoi(entry.c_str());
    if (!devices.empty() && device <= devices.back()) return {};  // such a list hides all
    if (device < there) devices.push_back(device);
  }
  return devices;
}

inline const std::vector<int>& devices() {
  static const std::vector<int> found = read_devices();
  return found;
}

inline c10::DeviceIndex device_count() {
  return static_cast<c10::DeviceIndex>(devices().size());
}

inline void check_index(c10::DeviceIndex index) {
  TORCH_CHECK(0 <= index && index < device_count(), "Invalid NPU device ID ", static_cast<int>(index), ": there are ",
              static_cast<int>(device_count()), " NPUs");
}

// ---------------------------------------------------------------- starting

inline std::atomic<bool> used{false};
inline std::atomic<bool> forked{false};  // from a process that had used a device

// Everything that touches a device comes through here.
inline void start() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = used.load(); });
  (void)registered;
  TORCH_CHECK(!forked,
              "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must use the "
              "'spawn' start method");
  TORCH_CHECK(device_count() > 0, "No NPU devices are available");
  used = true;
}

// ---------------------------------------------------------------- the current device

inline thread_local c10::DeviceIndex current_index = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return NPU;
  }
  c10::Device getDevice() const override {
    return {NPU, current_index};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.type() == NPU, "expected an NPU, not ", device);
    if (!device.has_index()) return;
    check_index(device.index());
    current_index = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_index = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    try {
      return device_count();
    } catch (const std::exception&) {
      return 0;
    }
  }

  // All work is done when the call that asked for it returns: streams and events have nothing to do.
  c10::Stream getStream(c10::Device device) const override {
    const auto index = device.has_index() ? device.index() : current_index;
    check_index(index);
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(NPU, index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return getStream(device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    check_index(index);
    start();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---------------------------------------------------------------- memory

struct Memory final : c10::DeviceAllocator {
  using Stat = c10::CachingAllocator::Stat;
  struct Block {
    void* data;
    size_t size;
    c10::DeviceIndex index;
  };

  std::mutex mutex;
  std::array<Stat, 64> bytes{};

  static Memory& instance() {
    static auto* memory = new Memory();  // outlives every tensor
    return *memory;
  }

  c10::DataPtr allocate(size_t size) override {
    start();
    check_index(current_index);
    auto* block = new Block{c10::alloc_cpu(size), size, current_index};
    {
      std::lock_guard lock(mutex);
      bytes.at(block->index).increase(size);
    }
    return {block->data, block, &Memory::release, c10::Device(NPU, block->index)};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    c10::free_cpu(block->data);
    {
      std::lock_guard lock(instance().mutex);
      instance().bytes.at(block->index).decrease(block->size);
    }
    delete block;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool initialized() override {
    return used;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    check_index(index);
    std::lock_guard lock(mutex);
    c10::CachingDeviceAllocator::DeviceStats stats;
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    stats.allocated_bytes[all] = stats.reserved_bytes[all] = stats.active_bytes[all] = bytes.at(index);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    check_index(index);
    std::lock_guard lock(mutex);
    bytes.at(index).reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    check_index(index);
    std::lock_guard lock(mutex);
    bytes.at(index).reset_peak();
  }
};

inline const bool memory_registered = [] {
  c10::SetAllocator(NPU, &Memory::instance());
  return true;
}();

// Host memory of which `is_pinned` knows that it is pinned.
struct Pinned final : c10::Allocator {
  std::mutex mutex;
  std::unordered_set<const void*> blocks;

  static Pinned& instance() {
    static auto* pinned = new Pinned();
    return *pinned;
  }
  c10::DataPtr allocate(size_t size) override {
    start();
    void* data = c10::alloc_cpu(size);
    std::lock_guard lock(mutex);
    blocks.insert(data);
    return {data, data, &Pinned::release, c10::Device(c10::kCPU)};
  }
  static void release(void* data) {
    {
      std::lock_guard lock(instance().mutex);
      instance().blocks.erase(data);
    }
    c10::free_cpu(data);
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool contains(const void* data) {
    std::lock_guard lock(mutex);
    return data && blocks.count(data);
  }
};

// ---------------------------------------------------------------- random numbers

// Draws what a CPU generator of its own draws.
struct NpuGenerator final : c10::GeneratorImpl {
  at::Generator host = at::detail::createCPUGenerator();

  explicit NpuGenerator(c10::DeviceIndex index)
      : c10::GeneratorImpl({NPU, index}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    host.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host.get_offset();
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  NpuGenerator* clone_impl() const override {
    auto* copy = new NpuGenerator(device_.index());
    copy->host = host.clone();
    return copy;
  }
};

inline const at::Generator& default_generator(c10::DeviceIndex index) {
  static const auto generators = [] {
    std::vector<at::Generator> all;
    for (c10::DeviceIndex i = 0; i < device_count(); i++) {
      all.push_back(at::make_generator<NpuGenerator>(i));
      all.back().set_current_seed(c10::default_rng_seed_val);
    }
    return all;
  }();
  if (index < 0) index = current_index;
  check_index(index);
  return generators[index];
}

// ---------------------------------------------------------------- what PyTorch asks a backend

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return Guard().deviceCount() > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return used;
  }
  void init() const override {
    start();
  }
  c10::DeviceIndex deviceCount() const override {
    return Guard().deviceCount();
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    Guard().setDevice({NPU, index});
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_index;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return Guard().exchangeDevice({NPU, index}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    if (index < 0) index = current_index;
    check_index(index);
    return at::make_generator<NpuGenerator>(index);
  }
  bool isPinnedPtr(const void* data) const override {
    return Pinned::instance().contains(data);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return &Pinned::instance();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    const c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), size);
  }
};

inline const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace npu_sim
