"""Whatever goes wrong ends in one sentence that names the thing, the value and the remedy; nothing is half-written."""
from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
import models
from engine import checkpoint, distributed
from engine.device import chosen_device
from engine.errors import Failure, one_sentence

ROOT = Path(__file__).resolve().parent.parent


def refused(result, status: int, *words: str) -> None:
    assert result.status == status, result.err + result.out
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and "Traceback" not in result.err
    for word in words:
        assert str(word) in result.err, result.err


@pytest.mark.parametrize("script, flags, words", [
    ("train_fgsm_rs", ("--epsilom", "8"), ("--epsilom", "--epsilon")),
    ("train_fgsm_rs", ("--epochs", "0"), ("--epochs 0", "at least 1")),
    ("train_fgsm_rs", ("--epochs", "many"), ("--epochs", "many")),
    ("train_fgsm_rs", ("--epsilon", "300"), ("--epsilon 300", "[0, 255]")),
    ("train_fgsm_rs", ("--alpha", "-1"), ("--alpha -1", "at least 0")),
    ("train_fgsm_rs", ("--label-factor", "1.5"), ("--label-factor 1.5", "[0, 1]")),
    ("train_fgsm_rs", ("--dataset", "mnist"), ("mnist", "digits", "cifar10")),
    ("train_fgsm_rs", ("--arch", "resnet19"), ("--arch resnet19", "resnet18")),
    ("train_fgsm_rs", ("--lr-schedule", "linear"), ("linear", "cyclic")),
    ("train_fgsm_rs", ("--measure", "clean"), ("--measure clean", "pgd10")),
    ("train_fgsm_rs", ("--measure", "pgd10,dpg"), ("dpg", "allowed")),
    ("train_fgsm_rs", ("--measure", "pgd10, aa"), ("--measure pgd10, aa", "aa would take longer", "test_FGSM_SDI.py")),
    ("train_fgsm_rs", ("--val-size", "0"), ("--val-size 0", "--select-on test")),
    ("train_fgsm_rs", ("--train-size", "1400"), ("--train-size 1400", "1437")),
    ("train_fgsm_rs", ("--device", "cuda:77"), ("--device cuda:77", "--device cpu")),
    ("train_fgsm_rs", ("--device", "tpu"), ("--device tpu", "auto, cpu, cuda")),
    ("train_fgsm_rs", ("--resume", "must"), ("--resume must", "state.pth")),
    ("train_fgsm_sdi", ("--k", "0"), ("--k 0", "at least 1")),
    ("train_fgsm_sdi", ("--generator-lr", "-1"), ("--generator-lr -1", "at least 0")),
    ("train_fgsm_uap", ("--uap-epsilon", "-10"), ("--uap-epsilon -10", "at least 0")),
    ("train_fgsm_rs_cs", ("--stride", "-1"), ("--stride -1", "at least 0")),
    ("train_pgd_at", ("--steps", "0"), ("--steps 0", "at least 1")),
    ("train_las_at", ("--steps", "0,4"), ("--steps 0,4", "whole numbers, from 1 on")),
    ("train_las_at", ("--steps", "2.5,4"), ("--steps 2.5,4", "whole numbers")),
    ("train_las_at", ("--base", "trades", "--label-factor", "0.7"), ("--label-factor 0.7", "--base")),
    ("train_las_at", ("--strategy-lr", "-1"), ("--strategy-lr -1", "at least 0")),
    ("train_las_at", ("--momentum", "-1"), ("--momentum -1", "at least 0")),
    ("train_lbgat", ("--teacher", "vgg"), ("vgg", "resnet18")),
    ("test_FGSM_SDI", (), ("--model-path",)),
])
def test_misuse(script, flags, words, tiny):
    out_dir = tiny.directory / "out"
    shared = (*tiny.flags, "--out-dir", out_dir) if script.startswith("train") else ()
    refused(tiny.command(script, *shared, *flags), 2, *words)
    left = {path.name for path in out_dir.iterdir()} if out_dir.is_dir() else set()
    assert left <= {".lock"}


@pytest.mark.parametrize("flags, words", [
    (("--norm", "L2"), ("--norm L2", "Linf")),
    (("--attacks", "clean,deepfool"), ("deepfool", "pgd10")),
    (("--epsilon", "-8"), ("--epsilon -8", "above 0")),
    (("--model", "vgg"), ("--model vgg", "resnet18")),
    (("--model", "resnet18"), ("resnet18", "keys missing")),
    (("--dataset", "imagenet21k"), ("imagenet21k", "digits")),
])
def test_evaluation_misuse(flags, words, digits_run, tiny):
    refused(tiny.command("test_FGSM_SDI", "--model-path", digits_run / "best.pth", "--out-dir", tiny.directory / "e", *flags), 2, *words)
    assert not list(tiny.directory.glob("e/evaluation.json"))


def test_a_checkpoint_that_is_not_there(tiny):
    refused(tiny.command("test_FGSM_SDI", "--model-path", tiny.directory / "no.pth"), 2, "no.pth")


def test_a_checkpoint_of_other_channels(digits_run, tiny):
    x = np.zeros((20, 32, 32, 3), np.uint8)
    np.savez(tiny.directory / "cifar10.npz", x_train=x, y_train=np.arange(20) % 10, x_test=x, y_test=np.arange(20) % 10)
    refused(tiny.command("test_FGSM_SDI", "--model-path", digits_run / "best.pth", "--dataset", "cifar10", "--data-dir", tiny.directory), 2,
            "1 channels", "cifar10 has 3", "--dataset")


def test_autoattack_of_three_classes_is_refused(tiny):
    x = np.zeros((20, 64, 64, 3), np.uint8)
    np.savez(tiny.directory / "tiny-imagenet.npz", x_train=x, y_train=np.arange(20) % 3, x_test=x, y_test=np.arange(20) % 3)
    network = models.build("preactresnet18", classes=3, width=2, image_size=64)
    torch.save({"state_dict": network.state_dict(), "arch": "preactresnet18", "width": 2}, tiny.directory / "three.pth")
    refused(tiny.command("test_FGSM_SDI", "--model-path", tiny.directory / "three.pth", "--data-dir", tiny.directory, "--dataset", "tiny-imagenet"), 2, "3 classes", "leave out aa")


def test_a_missing_tensorboard_is_said_before_training(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--tensorboard", "--out-dir", tiny.directory / "run")
    refused(result, 2, "--tensorboard", "pip install tensorboard")
    assert "epoch" not in result.out


def test_a_checkpoint_of_another_number_of_classes(digits_run, tiny):
    content = torch.load(digits_run / "best.pth", weights_only=True)
    content["state_dict"] = {key: value[:7] if key.startswith("linear") else value for key, value in content["state_dict"].items()}
    torch.save(content, tiny.directory / "seven.pth")
    refused(tiny.command("test_FGSM_SDI", "--model-path", tiny.directory / "seven.pth"), 2, "seven.pth", "7 classes")


def sound(n: int = 60) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return dict(x_train=x, y_train=np.arange(n) % 10, x_test=x[:20], y_test=np.arange(20) % 10)


DAMAGE = {
    "labels": (lambda a: a.update(y_train=a["y_train"] + 1), ("label 10", "0..9")),
    "negative label": (lambda a: a.update(y_test=a["y_test"] - 1), ("label -1",)),
    "floating images": (lambda a: a.update(x_train=a["x_train"] / 255), ("float64", "uint8")),
    "flat images": (lambda a: a.update(x_test=a["x_test"].reshape(20, -1)), ("x_test", "(20, 3072)")),
    "no images": (lambda a: a.update(x_train=a["x_train"][:0], y_train=a["y_train"][:0]), ("N > 0",)),
    "too few labels": (lambda a: a.update(y_train=a["y_train"][:-1]), ("y_train", "(60,)")),
    "an array is missing": (lambda a: a.pop("y_test"), ("y_test",)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_data_file_that_is_wrong(what, tiny):
    change, words = DAMAGE[what]
    arrays = sound()
    change(arrays)
    np.savez(tiny.directory / "cifar10.npz", **arrays)
    result = tiny.command("train_fgsm_rs", "--dataset", "cifar10", "--data-dir", tiny.directory, "--val-size", 10, "--out-dir", tiny.directory / "o")
    refused(result, 2, "cifar10.npz", "move it away", *words)


@pytest.mark.parametrize("content", [b"", b"not a zip", "cut", "flipped"], ids=["empty", "text", "cut", "flipped"])
def test_a_data_file_that_is_damaged(content, tiny):
    path = tiny.directory / "cifar10.npz"
    np.savez(path, **sound())
    whole = bytearray(path.read_bytes())
    if content == "flipped":
        whole[len(whole) // 3] ^= 0xFF
    path.write_bytes({"cut": bytes(whole[:-2000]), "flipped": bytes(whole)}.get(content, content))
    result = tiny.command("train_fgsm_rs", "--dataset", "cifar10", "--data-dir", tiny.directory, "--val-size", 10, "--out-dir", tiny.directory / "o")
    refused(result, 2, "cifar10.npz", "damaged", "move it away")


def test_a_download_that_fails(tiny, monkeypatch):
    import torchvision

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", type("CIFAR10", (), {"__init__": unreachable}))
    result = tiny.command("train_fgsm_rs", "--dataset", "cifar10", "--data-dir", tiny.directory / "data", "--out-dir", tiny.directory / "o")
    refused(result, 1, "cifar10", "no route to host", "cifar10.npz")
    assert not (tiny.directory / "data").exists(), "nor a folder in which nothing lies"


@pytest.mark.parametrize("name, theirs, classes", [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)])
def test_a_data_set_made_from_torchvisions_files(name, theirs, classes, tiny, monkeypatch):
    """What the download gives becomes the local form, and is read from there afterwards."""
    import torchvision
    from engine import data

    class Downloaded:
        def __init__(self, root, train, download):
            arrays = sound()
            self.data, self.targets = (arrays["x_train"], arrays["y_train"].tolist()) if train else (arrays["x_test"], arrays["y_test"].tolist())

    monkeypatch.setattr(torchvision.datasets, theirs, Downloaded)
    first = data.load(name, tiny.directory)
    monkeypatch.delattr(torchvision.datasets, theirs)
    again = data.load(name, tiny.directory)
    for part, array in sound().items():
        assert np.array_equal(getattr(first, part), array) and np.array_equal(getattr(again, part), array)
    assert {path.name for path in tiny.directory.iterdir()} == {f"{name}.npz"}
    assert (first.classes, first.flip, first.pad) == (classes, True, 4)


@pytest.mark.parametrize("content", [b"", b"nothing", "cut"], ids=["empty", "text", "cut"])
def test_a_damaged_state(content, tiny):
    out_dir = tiny.train("train_fgsm_rs")
    path = out_dir / "state.pth"
    path.write_bytes(path.read_bytes()[:-3000] if content == "cut" else content)
    refused(tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", out_dir), 2, "state.pth", "--resume never")


def test_a_loss_that_is_not_finite(tiny):
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", tiny.directory / "o", "--lr", "1e30", "--lr-schedule", "constant")
    refused(result, 1, "not finite", "update", "--lr")


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="needs /proc")
def test_a_directory_that_cannot_be_written(tiny):
    refused(tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", "/proc/run"), 1, "/proc/run")


def test_no_room_on_the_disk(tiny, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    result = tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", tiny.directory / "o")
    refused(result, 1, "no room", "--out-dir")
    assert not list((tiny.directory / "o").glob("*.part"))


def test_interrupted(tiny, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Run, "update", interrupt)
    refused(tiny.command("train_fgsm_rs", *tiny.flags, "--out-dir", tiny.directory / "o"), 130, "run the same command again")


def test_a_network_that_diverged_is_not_evaluated(digits_run, tiny):
    content = torch.load(digits_run / "best.pth", weights_only=True)
    content["state_dict"]["linear.weight"][0, 0] = float("nan")
    torch.save(content, tiny.directory / "nan.pth")
    refused(tiny.command("test_FGSM_SDI", "--model-path", tiny.directory / "nan.pth"), 2, "linear.weight", "not finite")


def test_a_real_process_ends_with_the_status():
    done = subprocess.run([sys.executable, "train_fgsm_rs.py", "--epochs", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: --epochs 0") and done.stderr.count("\n") == 1


def test_a_gpu_without_memory_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as end, one_sentence():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    said = capsys.readouterr().err
    assert end.value.code == 1 and "out of memory on the GPU" in said and "--batch-size" in said and said.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads(unbuffered):
    """As with `| head`: in one sentence, whether the print fails or only the flush at the end."""
    with subprocess.Popen([sys.executable, "reproduce.py", "list"], cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and said.startswith("error: whatever read this program's output has ended") and said.count("\n") == 1


@pytest.mark.parametrize("error, words", [
    (OSError(errno.EIO, "Input/output error"), ("[Errno 5] Input/output error", "OSError in line", "test_errors.py", "run the same command again")),
    (OSError("no name"), ("no name", "OSError in line")),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ("out of memory", "--batch-size")),
    (OSError(errno.ENOENT, "No such file", "there"), ("there: No such file",)),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), ("a process that reads images was killed",)),  # the output is being read
    (ConnectionResetError(errno.ECONNRESET, "reset"), ("a process that reads images was killed",)),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0. RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: "
                  "No space left on device (28)"), ("a process that reads images", "/dev/shm", "--workers")),
])
def test_an_error_of_the_system_is_one_sentence(error, words, capsys):
    with pytest.raises(SystemExit) as left, one_sentence():
        raise error
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


def test_a_gpu_that_torch_was_not_built_for(monkeypatch):
    capability = [7, 0]
    for name, value in {"is_available": True, "device_count": 1, "get_arch_list": ["sm_75", "sm_90a", "compute_90"], "get_device_name": "a V100"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    for name in ("auto", "cuda"):
        with pytest.raises(engine.Misuse, match="no kernels for a V100, whose compute capability is 7.0.*--device cpu"):
            chosen_device(name)
    assert chosen_device("cpu").type == "cpu"
    for capability[:] in ([7, 5], [12, 0]):
        assert chosen_device("auto").type == "cuda", "newer ones run what was built for older ones, or torch compiles it for them"


def test_a_process_of_another_launcher(monkeypatch):
    """Some set RANK alone."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(engine.Misuse, match="RANK is 0 in the environment, and LOCAL_RANK is missing: start with torchrun"):
        distributed.start(torch.device("cpu"))


def test_a_terminal_without_a_dagger():
    program = "from engine.errors import one_sentence\nwith one_sentence(): print('47.2 †')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "47.2 ?\n", "")


def test_an_empty_argument(tiny):
    refused(tiny.command("train_fgsm_rs", ""), 2, "an empty argument is no flag of train_fgsm_rs.py")


def test_failure_is_no_misuse():
    assert not issubclass(Failure, engine.Misuse) and not issubclass(engine.Misuse, Failure)


def test_a_radius_that_looks_like_a_fraction_of_1_is_doubted(tiny):
    """TRADES' and AWP's scripts call 0.031 what is 8 here; a network trained with 0.031/255 is not robust at all."""
    ended = tiny.command("train_fgsm_rs", *tiny.flags, "--epochs", 1, "--epsilon", 0.031, "--out-dir", tiny.directory / "run")
    assert ended.status == 0 and "warning: --epsilon 0.031 is 0.031/255; if it was meant as a fraction of 1, give --epsilon 7.9" in ended.out
    flags = ("--model-path", tiny.directory / "run" / "best.pth", "--attacks", "clean", "--n-ex", 20, "--card-n", 0)
    assert "warning: --epsilon 0.031 is 0.031/255" in tiny.command("test_FGSM_SDI", *flags).out
    assert "warning: --epsilon" not in tiny.command("test_FGSM_SDI", *flags, "--epsilon", 0.5, "--out-dir", tiny.directory / "other").out
