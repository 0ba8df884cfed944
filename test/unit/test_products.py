"""nmt/products.py: every way to multiply gives the same product."""

import gru
from nmt import products

import pytest
import torch
from plain_model import EMB, HID, SRC_VOCAB, TRG_VOCAB, gradients

SIZES = [(32, 24, 40), (300, 20, 17)]  # rows, inner, columns


def layouts(rows, columns):
    """The same matrix with rows or columns one after the other, and with gaps between them."""
    matrix = torch.randn(rows, columns)
    wide, high = torch.randn(rows, columns + 5), torch.randn(columns, rows + 3)
    wide[:, :columns], high[:, :rows] = matrix, matrix.T
    return [matrix, matrix.T.contiguous().T, wide[:, :columns], high[:, :rows].T]


@pytest.fixture
def by_onednn(monkeypatch):
    """float32 products as on a processor that oneDNN is faster on."""
    monkeypatch.setattr(products, "float32_by_onednn", lambda: True)


@pytest.fixture(params=["torch.mm", "oneDNN"])
def either_way(request, monkeypatch):
    monkeypatch.setattr(products, "float32_by_onednn", lambda: request.param == "oneDNN")


def test_pytorch_still_has_the_operators_of_onednn():
    """If it has them no more, float32 is half as fast on AMD's processors: find another way."""
    assert products.onednn_answers()


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_without_the_operators_torch_mm_multiplies(monkeypatch, tmp_path, error):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("vendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(products, "by_onednn", lambda a, b: (_ for _ in ()).throw(error()))
    assert not products.float32_by_onednn.__wrapped__(cpuinfo)


def test_an_operator_that_multiplies_otherwise_is_not_used(monkeypatch):
    monkeypatch.setattr(products, "by_onednn", lambda a, b: a @ b + 1)
    assert not products.onednn_answers()


@pytest.mark.parametrize(
    ("vendor", "expected"), [("AuthenticAMD", True), ("HygonGenuine", True), ("GenuineIntel", False), ("", False)]
)
def test_the_vendor_decides(tmp_path, vendor, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert products.float32_by_onednn.__wrapped__(cpuinfo) == expected
    assert not products.float32_by_onednn.__wrapped__(tmp_path / "nothing")


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("most_rows", [4096, 7])
def test_mm_is_the_product_whatever_the_layout(either_way, monkeypatch, sizes, most_rows):
    monkeypatch.setattr(products, "MOST_ROWS", most_rows)
    monkeypatch.setattr(products, "PART_ROWS", most_rows)
    torch.manual_seed(0)
    rows, inner, columns = sizes
    for a in layouts(rows, inner):
        for b in layouts(inner, columns):
            expected = a @ b
            torch.testing.assert_close(products.mm(a, b), expected)
            out = torch.ones(rows, columns + 1)
            products.mm(a, b, out=out[:, :columns])
            torch.testing.assert_close(out[:, :columns], expected)
            products.mm(a, b, out=out[:, :columns], accumulate=True)
            torch.testing.assert_close(out[:, :columns], expected * 2)
            assert (out[:, columns] == 1).all(), "what is beside it is left alone"


def test_half_products_of_many_rows_are_the_same_in_parts(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(100, 20).bfloat16(), torch.randn(20, 30).bfloat16()
    monkeypatch.setattr(products, "MOST_ROWS", 32)
    torch.testing.assert_close(products.mm(a, b), a @ b)


def test_linear_has_a_gradient_where_one_is_asked_for(by_onednn):
    x, weight = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)
    products.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, -1))
    with torch.no_grad():
        torch.testing.assert_close(products.linear(x, weight), x @ weight.T)


def test_linear_computes_in_half_under_autocast(either_way):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(torch.randn(300, 4), torch.randn(3, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (300, 1, 1), (1, 300, 5)])
def test_mm_of_empty_and_of_single_rows_and_columns(either_way, sizes):
    rows, inner, columns = sizes
    for a in layouts(rows, inner):
        for b in layouts(inner, columns):
            torch.testing.assert_close(products.mm(a, b), a @ b)
            torch.testing.assert_close(products.mm(a, b, out=torch.ones(rows, columns)), a @ b)


def test_numbers_of_rows_are_few_and_little_larger():
    half = torch.empty(0, dtype=torch.float16)
    counts = {products.rounded(rows, half) for rows in range(1, 8193)}
    assert len(counts) <= 16 * 6
    for rows in range(1, 8193):
        assert rows <= products.rounded(rows, half) < rows + max(16, rows / 8)


def test_only_products_without_a_compiled_kernel_take_any_number_of_rows(either_way):
    by_onednn, on_gpu = products.float32_by_onednn(), torch.empty(0, device="meta")
    assert products.rounded(17, torch.empty(0)) == (32 if by_onednn else 17)
    assert products.rounded(17, torch.empty(0, dtype=torch.float64)) == 17
    assert products.rounded(17, on_gpu) == 32, "GPUs like whole blocks of rows"


def test_spare_rows_are_zeros_behind_the_rows():
    x = torch.randn(3, 2)
    assert products.with_spare_rows(x, 3) is x
    assert torch.equal(products.with_spare_rows(x, 5), torch.cat((x, torch.zeros(2, 2))))


def test_loss_and_gradients_by_onednn_are_those_of_torch_mm(pairs, by_onednn, monkeypatch):
    *_, batch = pairs
    torch.manual_seed(0)
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID)
    gru.init_orthogonal(model)
    used = []
    onednn = products.by_onednn
    monkeypatch.setattr(products, "by_onednn", lambda a, b: used.append(a.shape) or onednn(a, b))
    loss = gru.TrainingLoss(model, 0.1)(batch, 1.0)
    actual = gradients(loss, model)
    assert used, "the products went that way"
    monkeypatch.setattr(products, "float32_by_onednn", lambda: False)
    expected = gru.TrainingLoss(model, 0.1)(batch, 1.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(actual, gradients(expected, model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_onednn", [False, True])
def test_a_weight_that_is_laid_out_gives_the_same_products(dtype, by_onednn, monkeypatch):
    monkeypatch.setattr(products, "float32_by_onednn", lambda: by_onednn)
    weight = torch.randn(70, 33).to(dtype)[:, :32]
    laid_out = products.Weight(weight)
    packs = dtype == torch.bfloat16 or (dtype == torch.float32 and by_onednn)
    assert (laid_out._packed is not None) == (packs and products.onednn_packs(dtype))
    with torch.no_grad():
        for rows in (0, 1, 16, 37):
            x = torch.randn(rows, 40).to(dtype)[:, 4:36]
            for words, found in (
                (slice(None), laid_out(x)),
                ([5, 0, 69], laid_out.select(torch.tensor([5, 0, 69]))(x)),
            ):
                expected = x.double() @ weight[words].T.double()
                assert found.dtype == dtype and found.shape == expected.shape
                torch.testing.assert_close(
                    found.double(),
                    expected,
                    rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
                    atol=0.1 if dtype == torch.bfloat16 else 1e-4,
                )


def test_where_onednn_does_not_pack_torch_multiplies(monkeypatch):
    monkeypatch.setattr(products, "onednn_packs", lambda dtype: False)
    weight, x = torch.randn(7, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    with torch.no_grad():
        assert torch.equal(products.Weight(weight)(x), x @ weight.T)
