"""The note on processes that fight for cores, with a load that is made up."""

from nmt import cores

import pytest


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets the times of this process's two threads: seconds that they ran and waited. And a clock."""
    clock = [0.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cores, "TASKS", tmp_path / "task")
    monkeypatch.setattr(cores, "WATCHED", 2.0)

    def set_to(seconds, ran, waited):
        clock[0] = seconds
        for thread in ("1", "2"):
            (tmp_path / "task" / thread).mkdir(parents=True, exist_ok=True)
            times = f"{int(ran / 2 * 1e9)} {int(waited / 2 * 1e9)} 17\n"
            (tmp_path / "task" / thread / "schedstat").write_text(times)

    set_to(0.0, 50.0, 30.0)  # what was before does not count
    return set_to


@pytest.mark.parametrize(
    ("threads", "ran", "waited", "is_told"),
    [
        (2, 1.0, 3.2, True),  # a busy machine
        (2, 1.0, 0.5, True),  # one other process on two cores
        (2, 4.0, 0.2, False),  # a quiet one, on which all cores compute
        (2, 0.1, 0.001, False),  # a quiet one, on which this process does little
        (1, 1.0, 3.2, False),  # one thread already, as of eight processes on two cores: there is nothing to mend
    ],
)
def test_a_process_that_waits_for_cores_says_so_once(machine, threads, ran, waited, is_told):
    said = []
    watch = cores.CoreWatch(threads, said.append)
    machine(1.0, 50.0, 35.0)
    watch.look()
    assert not said, "too early to tell"
    for _ in range(2):
        machine(3.0, 50.0 + ran, 30.0 + waited)
        watch.look()
    assert len(said) == is_told
    if is_told:
        assert said[0].startswith("note: other processes take the cores: the 2 threads of this one waited ")
        assert "OMP_NUM_THREADS=1" in said[0]


def test_a_system_that_does_not_count_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "TASKS", tmp_path / "none")
    said = []
    cores.CoreWatch(2, said.append).look()
    (tmp_path / "none" / "1").mkdir(parents=True)
    (tmp_path / "none" / "1" / "schedstat").write_text("")
    assert cores.times() is None
    assert not said


def test_this_system_counts_the_time_of_this_process():
    if (before := cores.times()) is None:
        pytest.skip("no /proc/self/task/*/schedstat")
    sum(range(3_000_000))
    after = cores.times()
    assert after is not None
    assert after[0] > before[0]
