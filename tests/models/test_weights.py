"""Reading of checkpoints: what is unwrapped, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from genkit.weights import fit, read_safetensors, read_weights, unwrap

STATE = {"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "tree",
    [
        STATE,
        {"model": STATE, "optimizer": {"lr": 1.0}},
        {"module": STATE, "dtype": torch.float32},
        {"state_dict": STATE, "epoch": 3},
        {"epoch": 1, "trainer": {"vae": {"other": torch.ones(1)}, "net": STATE}},
        {"trainer": {"net": {"module": STATE}}},
    ],
)
def test_official_wrappers(tree, tmp_path):
    torch.save(tree, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth", parts=("net",))
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[k], v) for k, v in STATE.items())


def test_safetensors_and_prefix(tmp_path):
    save_file({f"stage.{k}": v for k, v in STATE.items()} | {"top": torch.ones(1)}, tmp_path / "x.safetensors", {"about": "it"})
    assert read_weights(tmp_path / "x.safetensors", prefix="stage.").keys() == STATE.keys()
    assert len(read_weights(tmp_path / "x.safetensors", prefix="none.")) == 3  # nothing is under it: the whole file
    assert read_safetensors(tmp_path / "x.safetensors")[1] == {"about": "it"}


@pytest.mark.parametrize("tree", [{}, {"epoch": 1, "lr": 0.1}, [torch.ones(1)], {"model": {"epoch": 1}}, torch.ones(2)])
def test_files_without_weights(tree):
    with pytest.raises(ValueError, match=r"path='f\.pt' holds .*: no dict of tensors, neither bare nor under net, model"):
        unwrap(tree, ("net",), "f.pt")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("data", [b"", b"not a model\n" * 50, b"PK\x03\x04broken", b"\x80\x02broken", "cut"])
def test_damaged_files(name, data, tmp_path):
    path = tmp_path / name
    if data == "cut":
        (save_file if name.endswith("s") else torch.save)(STATE, path)
        data = path.read_bytes()[:-100]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"path='.*{name}' .*the file is damaged or of another format"):
        read_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_code_is_refused_and_not_run(zipped, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "x.pth"

    class Hostile:
        def __reduce__(self):
            return ran.write_text, ("code ran",)

    torch.save({"model": STATE, "hook": Hostile()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"needs code to load, which is refused .*save its tensors as \.safetensors"):
        read_weights(path)
    assert not ran.exists()


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path=.*is not a file"):
        read_weights(tmp_path)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.register_buffer("mask", torch.zeros(2))


def test_fit_takes_the_types_of_the_network_and_leaves_optional_keys():
    net = Net()
    weights = {"a.weight": torch.full((2, 2), 3.0, dtype=torch.bfloat16), "a.bias": torch.ones(2).half(), "loss.x": torch.ones(1)}
    fit(net, weights, "f", optional=("mask",), ignore=("loss.",))
    assert net.a.weight.eq(3).all()
    assert net.a.weight.dtype == torch.float32
    assert net.mask.eq(0).all()


def test_fit_on_the_meta_device():
    with torch.device("meta"):
        net = Net()
    fit(net, STATE | {"mask": torch.full((2,), -torch.inf)}, "f")  # a buffer may be infinite
    assert net.a.weight.eq(1).all()
    assert net.a.weight.requires_grad
    assert net.mask.isinf().all()


@pytest.mark.parametrize(("key", "value"), [("a.weight", torch.nan), ("a.weight", torch.inf), ("mask", torch.nan)])
def test_fit_refuses_what_is_not_finite(key, value):
    net = Net()
    before = net.a.weight.clone()
    weights = {k: v.clone() for k, v in (STATE | {"mask": torch.zeros(2)}).items()}
    weights[key].view(-1)[1] = value
    with pytest.raises(ValueError, match=rf"model='f': weight '{key}' holds NaN or infinity"):
        fit(net, weights, "f", name="model")
    assert torch.equal(net.a.weight, before)
