import json
import re
import struct

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

import autocompress_fast as acf
from autocompress_fast.cli import job as jobs
from autocompress_fast.cli.commands import commands
from autocompress_fast.pipeline import Recipe
from autocompress_fast.rates import Target
from autocompress_fast.training import Trainer

SHORT = ["--admm-epochs", "1", "--retrain-epochs", "0", "--final-epochs", "1", "--rounds", "1"]
QUICK = [*SHORT, "--base-epochs", "2", "--batch-size", "128", "--precision", "float32", "--threads", "1"]
DIGITS = ["compress", "lenet_digits", "--data", "digits", "--target", "3x"]


def run(*arguments):
    return CliRunner().invoke(commands, [str(a) for a in arguments])


def fails(result, message, code=2):
    """The run ended with one line on standard error, and nothing else anywhere."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on the digits: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = run(*DIGITS, *QUICK, "--workdir", folder, "--json")
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder like MNIST's, of a few hundred digits enlarged to 28 x 28."""
    folder = tmp_path_factory.mktemp("mnist")
    digits = acf.data.digits()
    for prefix, part in (("train", digits.train.subset(slice(600))), ("t10k", digits.test.subset(slice(100)))):
        images = np.zeros((len(part), 28, 28), np.uint8)
        images[:, 2:26, 2:26] = (part.images[:, 0] * 255).astype(np.uint8).repeat(3, axis=1).repeat(3, axis=2)
        for kind, array in (("images-idx3", images), ("labels-idx1", part.labels.astype(np.uint8))):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


# ---- compress


def test_compress_prints_one_json_object_and_leaves_everything_in_the_folder(finished):
    folder, result = finished
    printed = json.loads(result.stdout)
    assert printed == json.loads((folder / "result.json").read_text())
    assert printed["rates"]["params"] >= 3
    assert printed["engine"]["agrees"]
    assert printed["engine"]["accuracy"] == printed["accuracy"]["final_test"]
    assert printed["engine"]["samples"] == 449
    assert printed["bytes"] == (folder / "model.acf").stat().st_size < printed["dense_bytes"]
    assert "all weights" in (folder / "report.txt").read_text()
    assert {"weights.png", "accuracy.png"} == {path.name for path in (folder / "plots").iterdir()}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"model.acf, read back and run without torch: {printed['engine']['accuracy']:.2f}%" in page
    assert f"{printed['bytes'] / 1000:,.1f} kB" in page
    plan = acf.Plan.load(folder / "plan.json")
    assert {name: layer["weights"] for name, layer in printed["layers"].items()} == {
        name: layer.weights for name, layer in plan.items()
    }
    assert "round1.admm" in result.stderr, "progress goes to standard error"


def test_the_saved_file_says_what_predict_needs(finished):
    folder, result = finished
    info = acf.load(folder / "model.acf").info
    data = acf.data.digits()
    assert info["classes"] == list(data.classes)
    assert (info["mean"], info["std"]) == (list(data.train.mean), list(data.train.std))
    assert info["accuracy"] == pytest.approx(json.loads(result.stdout)["accuracy"]["final_test"] / 100)


def test_the_same_command_again_trains_nothing_and_says_the_same(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(Trainer, "_epoch", lambda *_: pytest.fail("it trained again"))
    again = run(*DIGITS, *QUICK, "--workdir", folder, "--json")
    assert json.loads(again.stdout) == json.loads(result.stdout)


@pytest.mark.parametrize("stage", ["base", "round1.final"])
def test_a_stopped_run_is_continued_by_the_same_command(finished, monkeypatch, tmp_path, stage):
    command = [*DIGITS, *QUICK, "--workdir", tmp_path, "--json"]

    def interrupted(trainer, epoch, train=Trainer._epoch):
        if trainer.name == stage:
            raise KeyboardInterrupt
        train(trainer, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", interrupted)
        stopped = run(*command)
    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    assert f"stopped; the finished epochs are in {tmp_path}" in stopped.stderr
    assert not (tmp_path / "model.acf").exists()

    assert run(*command).exit_code == 0
    folder, _ = finished
    for name in ("model.acf", "plan.json", "base.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_ctrl_c_elsewhere_stops_quietly(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "inspected", interrupted)
    result = run("inspect", "lenet5")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped\n")


def test_another_recipe_does_not_continue_a_run(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    differs = r"another recipe \(final_lr 0\.006 there, 0\.5 here\); choose another work"
    fails(run(*DIGITS, *QUICK, "--final-lr", "0.5", "--workdir", folder), differs)
    fails(run(*DIGITS, *QUICK, "--elastic", "0.5", "--workdir", folder), "another augmentation; choose another work")
    fails(run(*DIGITS, *QUICK, "--elastic", "0.5", "--no-augment"), r"--elastic 0\.5 and --no-augment contradict")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path in before}.keys() == before.keys()


def test_compress_prints_tables_and_takes_a_trained_network(finished, tmp_path):
    folder, _ = finished
    output = tmp_path / "else" / "small.acf"
    result = run(
        *DIGITS, *QUICK[: QUICK.index("--base-epochs")], "--batch-size", "128", "--precision", "float32",
        "--checkpoint", folder / "base.safetensors", "--workdir", tmp_path / "run", "--output", output,
        "--structure", "element", "--threads", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run" / "base.ckpt").exists()
    assert re.search(r"all weights +13,584 -> [\d,]+ +3\.0x", result.stdout)
    assert "the same class as in torch for all 449 test images" in result.stdout
    assert acf.load(output).weights.kept <= 13584 / 3


def test_mnist_files_with_lenet5_in_the_usual_folder(mnist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", mnist, "--dataset", "mnist", "--target", "conv=4", "--no-augment", "--validation", "0.2"]
    result = run("compress", "lenet5", *options, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "lenet5-mnist-conv4-seed0"
    printed = json.loads(result.stdout)
    assert printed["file"] == "runs/lenet5-mnist-conv4-seed0/model.acf"
    assert printed["rates"]["conv"] >= 4
    checked = json.loads(run("predict", folder / "model.acf", "--data", mnist, "--json").stdout)
    assert checked["accuracy"] == pytest.approx(printed["accuracy"]["final_test"])
    assert (checked["samples"], checked["data"]) == (100, "mnist")
    assert checked["recorded_accuracy"] == pytest.approx(checked["accuracy"])


def test_names_of_runs():
    def name(target, model="lenet5", max_drop=None, **recipe):
        goal = None if target is None else Target.parse(target)
        return jobs.run_name(model, "mnist", goal, max_drop, Recipe(**recipe))

    assert name("conv=40") == "lenet5-mnist-conv40-seed0"
    assert name("2.5x", seed=3) == "lenet5-mnist-params2.5-seed3"
    assert name("conv=40,macs=4", structure="element") == "lenet5-mnist-conv40-macs4-element-seed0"
    assert name("conv=2", "my.nets:Small") == "Small-mnist-conv2-seed0"
    assert name("3x faster, threads=2, bytes=20k") == "lenet5-mnist-speedup3-bytes20000-threads2-seed0"
    assert name(None, max_drop=0.5) == "lenet5-mnist-drop0.5-seed0"


@pytest.mark.parametrize("text", ["conv1", "=0.5", "conv1=", "conv1=half", "conv1=0.1:0.2:0.3", "conv1=nan"])
def test_shares_that_are_none(text):
    with pytest.raises(ValueError, match=r"--keep is PATTERN=SHARE or PATTERN=LEAST:MOST, each pattern once, got"):
        jobs.shares([text])


def test_a_dry_run_of_bytes_and_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["compress", "lenet_digits", "--data", "digits", "--target", "2x, bytes=12k", "--dry-run", "--json"]
    printed = json.loads(run(*options, "--keep", "conv1=0.9", "--rounds", "1").stdout)
    assert printed["can_be_met"]
    assert printed["small"]["bytes"] <= 12000 < printed["dense"]["bytes"]
    filters, columns = printed["rounds"][0]["layers"]["conv1"]["keep"]
    assert filters * columns >= 0.9 * acf.models.create("lenet_digits").conv1.weight.numel()


def test_at_most_5000_images_decide_unless_told(monkeypatch):
    asked = []
    digits = acf.data.digits()

    def load(*_, validation, **__):
        asked.append(validation)
        return digits

    monkeypatch.setattr(jobs.datasets, "load", load)
    monkeypatch.setattr(jobs, "_MOST_VALIDATION", 100)
    common = {"dataset": None, "augment": True, "base_augment": True, "recipe": {}, "base": {}}
    common |= {"checkpoint": None, "workdir": None}
    for given in (None, "300", "0.25"):
        jobs.Job.prepared("lenet_digits", "digits", "2x", validation=given, **common)
    assert asked == [None, 100, 300, 0.25]


# ---- compress: a network of one's own

NETWORKS = """
import torch

def small():
    layers = torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 36, 10)
    return torch.nn.Sequential(*layers)

def nothing():
    return "a network"

def three_classes():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))

def large_images():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

text = "a network"
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_networks", raising=False)


@pytest.mark.usefixtures("networks")
def test_own_network(tmp_path):
    result = run("compress", "my_networks:small", "--data", "digits", "--target", "2x", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "small-digits-params2-seed0" / "model.acf").exists()


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_network:small", "there is no module 'my_network'"),
        ("my_networks:smal", "nothing callable named 'smal'"),
        ("my_networks:text", "nothing callable named 'text'"),
        ("my_networks:nothing", "must return a torch.nn.Module, got str"),
        ("my_networks:three_classes", r"must put out \(2, 10\) for 2 images of digits, got \(2, 3\)"),
        ("my_networks:large_images", "does not take the 1x8x8 images of digits"),
    ],
)
def test_own_network_that_does_not_fit(tmp_path, name, message):
    fails(run("compress", name, "--data", "digits", "--target", "2x", *QUICK), message)
    assert not (tmp_path / "runs").exists()


# ---- compress: dry run


def test_dry_run_says_what_would_happen_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*DIGITS, "--dry-run", "--rounds", "2", "--threads", "1", "--base-epochs", "7"]
    printed = json.loads(run(*command, "--json").stdout)
    assert printed["can_be_met"]
    assert [part["target"] for part in printed["rounds"]] == ["params 2.08x", "params 3x"]
    recipe = Recipe()
    assert printed["epochs"] == 2 * recipe.admm_epochs + recipe.retrain_epochs + recipe.final_epochs
    assert printed["base_epochs"] == 7
    assert printed["seconds_at_most"] > 0
    filters, columns = printed["rounds"][-1]["layers"]["fc1"]["keep"]
    text = run(*command)
    assert text.exit_code == 0
    assert "the target params 3x can be met" in text.stdout
    assert f"{filters} x {columns}" in text.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_what_cannot_be_met(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["compress", "lenet_digits", "--data", "digits", "--target", "conv=100000", "--dry-run"]
    result = run(*command, "--json")
    assert result.exit_code == 2
    printed = json.loads(result.stdout)
    assert not printed["can_be_met"]
    assert re.search(r"conv 100000x cannot be met .* at most conv", printed["reason"])
    text = run(*command)
    assert (text.exit_code, text.stdout) == (2, printed["reason"] + "\n")
    assert list(tmp_path.iterdir()) == []


# ---- errors


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compress", "lenet6", "--data", "digits", "--target", "2x"], "unknown model 'lenet6'; known are lenet5"),
        (["compress", "lenet5", "--data", "digits", "--target", "2x"], "image_size must be 16 or more, got 8"),
        ([*DIGITS[:-1], "twice"], "a target is like 20x, conv=40, macs=4, .*, got 'twice'"),
        ([*DIGITS[:-1], "conv=1e9"], "cannot be met"),
        ([*DIGITS, "--structure", "row"], "structure must be one of .*, got 'row'"),
        ([*DIGITS, "--precision", "int8"], "precision must be .*, got 'int8'"),
        ([*DIGITS, "--validation", "some"], "--validation must be a count .*, got 'some'"),
        ([*DIGITS, "--validation", "1.5"], "--validation must be a count .*, got '1.5'"),
        ([*DIGITS, "--dataset", "letters"], "unknown dataset 'letters'"),
        ([*DIGITS, "--base-lr", "-1"], "lr must be positive and finite, got -1.0"),
        ([*DIGITS, "--checkpoint", "nowhere.pt"], "nowhere.pt: expected a checkpoint file, found none"),
        ([*DIGITS, "--checkpoint", "nowhere.pt", "--base-lr", "1"], "--checkpoint gives already"),
        (["compress", "lenet5", "--data", "nowhere", "--target", "2x"], "nowhere: expected a folder .* found nothing"),
        (["inspect", "lenet6"], "unknown model 'lenet6'"),
        (["inspect", "torch.nn:ReLU"], "say what images it takes"),
        (["inspect", "lenet5", "--exclude", "conv3"], "exclude: no layer matches 'conv3'; layers: conv1, conv2, fc1"),
        (["inspect", "lenet5", "--select", "re:conv("], r"'re:conv\(' is no regular expression: .*unterminated"),
        (["inspect", "lenet5", "--select", "type:Conv9d"], "no module is of a class 'Conv9d'; there are .*Conv2d"),
        (["inspect", "lenet5", "--input-shape", "1x28x28"], "--input-shape must be numbers .*, got '1x28x28'"),
        (["inspect", "lenet5", "--input-shape", "0,28,28"], "--input-shape must be numbers"),
        (["predict", "nowhere.acf", "1.png"], "No such file .*nowhere.acf"),
        (["predict", "nowhere.acf"], "either INPUT files or --data"),
        (["predict", "nowhere.acf", "1.png", "--data", "digits"], "either INPUT files or --data"),
    ],
)
def test_errors_are_one_line(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(run(*command), message)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_debug_shows_where_an_error_came_from():
    result = run("--debug", "inspect", "lenet6")
    assert isinstance(result.exception, ValueError)


def test_errors_that_nobody_foresaw_keep_their_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(jobs, "inspected", broken)
    assert isinstance(run("inspect", "lenet5").exception, RuntimeError)


def test_a_run_that_diverges_says_so(tmp_path):
    result = run(*DIGITS, *QUICK, "--base-lr", "1e30", "--workdir", tmp_path)
    assert result.exit_code == 1
    assert re.search("^error: base: training diverged in epoch .* a learning rate below", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("absent", "arguments", "advice"),
    [
        ("typer", ["--version"], "typer: pip install 'autocompress-fast[demo]'"),
        ("torch", ["inspect", "vgg16"], "torch: pip install 'autocompress-fast[torch]'"),
    ],
)
def test_missing_extras_are_named(run_python, absent, arguments, advice):
    result = run_python(
        f"import sys; sys.modules[{absent!r}] = None; sys.argv[1:] = {arguments!r}\n"
        "from autocompress_fast.cli import app; app()"
    )
    package, _, command = advice.partition(": ")
    advice = f"error: this needs {package}, which is not installed: {command}\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", advice)


def test_version():
    assert run("--version").stdout == f"{acf.__version__}\n"


def test_compress_leaves_layers_as_they_are(tmp_path):
    arguments = [*DIGITS[:-1], "2x", *QUICK, "--workdir", tmp_path, "--exclude", "conv2", "--json"]
    printed = json.loads(run(*arguments).stdout)
    plan = acf.Plan.load(tmp_path / "plan.json")
    assert plan.held == {"conv2"}
    assert plan["conv2"].mask().all()
    assert printed["rates"]["params"] >= 2
    fails(run(*DIGITS[:-1], "2x", *QUICK, "--workdir", tmp_path), "holds a run with another choice of layers")
    fails(run(*DIGITS, "--exclude", "conv9", "--dry-run"), "exclude: no layer matches 'conv9'")
    impossible = run(*DIGITS[:-1], "3x", "--exclude", "type:Linear", "--dry-run", "--json")
    assert (impossible.exit_code, json.loads(impossible.stdout)["can_be_met"]) == (2, False)


# ---- inspect


def test_inspect_shows_layers_reasons_and_effects():
    text = run("inspect", "lenet5")
    assert text.exit_code == 0
    assert "430,500 weights, 25,500 of them in convolutions" in text.stdout
    assert "it is an output of the model fc2 0 0.0% 0 0.0%" in " ".join(text.stdout.split())
    printed = json.loads(run("inspect", "lenet5", "--json").stdout)
    assert [layer["name"] for layer in printed["layers"]] == ["conv1", "conv2", "fc1", "fc2"]
    assert printed["frozen"] == {"fc2": "filters: it is an output of the model"}
    half = printed["uniform"][1]
    assert (half["filters"], half["columns"]) == (0.5, 0.0)
    assert half["left"]["conv"] == 10 * 25 + 25 * 250
    assert half["left"]["params"] == 10 * 25 + 25 * 250 + 400 * 250 + 250 * 10
    assert "50% of the filters, 0% of the columns 25.5%, 3.9x 25.3%, 3.9x" in " ".join(text.stdout.split())


def test_inspect_takes_other_images():
    printed = json.loads(run("inspect", "resnet20", "--input-shape", "1,20,20", "--json").stdout)
    assert printed["layers"][0]["shape"] == [16, 1, 3, 3]
    assert printed["layers"][0]["macs"] == 9 * 16 * 20 * 20


def test_inspect_leaves_out_what_the_user_says():
    arguments = ("--exclude", "conv2", "--exclude", "type:Linear", "--json")
    printed = json.loads(run("inspect", "lenet5", *arguments).stdout)
    held = {"conv2": "it is excluded (conv2)", **dict.fromkeys(("fc1", "fc2"), "it is excluded (type:Linear)")}
    assert {layer["name"]: layer["held"] for layer in printed["layers"]} == {"conv1": "", **held}
    assert {one["reason"]: one["params"] for one in printed["frozen_by"]} == {
        "it is excluded (type:Linear)": 405_000,
        "it is excluded (conv2)": 25_000,
        "it is tied to a layer that is excluded (conv2)": 500,
    }
    assert printed["prunable_params"] == 0
    arguments = ("--select", "re:conv.|fc1", "--select", "fc*", "--exclude", "fc[1]")
    text = run("inspect", "lenet5", *arguments).stdout
    assert "it is excluded (fc[1])" in text
    assert "not selected" not in text
    text = run("inspect", "lenet5", "--select", "type:_ConvNd").stdout
    assert "it is not selected fc1, fc2 405,000 " in " ".join(text.split())


def test_inspect_shows_all_groups_where_asked():
    short, full = (run("inspect", "resnet20", *more).stdout for more in ((), ("--groups",)))
    rows = [
        [
            line
            for line in text.split("what lives and dies together")[1].split("\n\n")[0].splitlines()
            if " yes " in line
        ]
        for text in (short, full)
    ]
    assert sum(int(line.split()[-1].replace(",", "")) for line in rows[0]) == 64 + 3 * (16 + 32 + 64)
    assert sum(int(line.split()[-1].replace(",", "")) for line in rows[1]) == 64 + 3 * (16 + 32 + 64)
    assert sum(int(line.split()[-2]) for line in rows[0]) == len(rows[1])
    assert all(line.split()[-2] == "1" for line in rows[1])
    assert "conv1, layer1.0.conv2 and 8 more" in short
    assert " more " not in full.split("what lives and dies together")[1].split("\n\n")[0]
    assert "layer3.2.conv1 " in full


# ---- predict


@pytest.fixture(scope="module")
def digits():
    """Raw test images (float32, 0 to 1) and the classes that the torch-free engine gives them."""
    return acf.data.digits().test.subset(slice(12))


def expected_classes(finished, digits):
    engine = acf.load(finished[0] / "model.acf")
    return [str(c) for c in engine(digits.normalized()).argmax(axis=1)]


def predicted(*arguments):
    result = run("predict", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["predictions"]


def test_predict_arrays_of_every_form(finished, digits, tmp_path):
    expected = expected_classes(finished, digits)
    forms = {
        "batch": digits.images,
        "doubles": digits.images.astype(np.float64),
        "grey": digits.images[:, 0],
        "one": digits.images[0],
        "one-grey": digits.images[0, 0],
    }
    for name, array in forms.items():
        np.save(tmp_path / f"{name}.npy", array)
    got = predicted(finished[0] / "model.acf", *(tmp_path / f"{name}.npy" for name in forms))
    for name, array in forms.items():
        rows = [row for row in got if row["input"] == str(tmp_path / f"{name}.npy")]
        count = len(array) if name in ("batch", "doubles", "grey") else 1
        assert [row["class"] for row in rows] == expected[:count], name
        assert [row["index"] for row in rows] == list(range(count))
    for row in got:
        assert row["top"][0] == [row["class"], row["probability"]]
        probabilities = [share for _, share in row["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0.1 <= probabilities[0] <= 1


def test_predict_pictures(finished, digits, tmp_path):
    pixels = (digits.images[:, 0] * 255).round().astype(np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        PIL.Image.fromarray(image).save(path)
    PIL.Image.fromarray(pixels[0].repeat(4, axis=0).repeat(4, axis=1)).convert("RGB").save(tmp_path / "large.png")
    np.save(tmp_path / "bytes.npy", pixels)
    got = predicted(finished[0] / "model.acf", *paths, tmp_path / "large.png", tmp_path / "bytes.npy")
    for picture, pixels_alone in zip(got[:12], got[13:], strict=True):  # with as many samples in a batch or with others
        for (label, probability), (same, close) in zip(picture["top"], pixels_alone["top"], strict=True):
            assert label == same
            assert float(probability) == pytest.approx(float(close), abs=1e-5)
    assert [row["class"] for row in got[:12]] == expected_classes(finished, digits)
    assert got[12]["class"] == got[0]["class"]
    table = run("predict", finished[0] / "model.acf", paths[0])
    assert re.search(rf"0\.png +{got[0]['class']} .* \d+\.\d%$", table.stdout.strip())


def test_predict_data(finished):
    _, result = finished
    text = run("predict", finished[0] / "model.acf", "--data", "digits")
    accuracy = json.loads(result.stdout)["accuracy"]["final_test"]
    assert text.stdout == f"{accuracy:.2f}% of 449 test images of digits; {accuracy:.2f}% when it was saved\n"


def test_predict_without_anything_about_the_data(tmp_path, digits):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    acf.compile(model, torch.zeros(2, 1, 8, 8)).save(tmp_path / "plain.acf")
    np.save(tmp_path / "x.npy", digits.images)
    got = predicted(tmp_path / "plain.acf", tmp_path / "x.npy")
    expected = model(torch.from_numpy(digits.images)).argmax(dim=1).tolist()
    assert [row["class"] for row in got] == [str(c) for c in expected]


def test_predict_wrong_inputs(finished, mnist, digits, tmp_path):
    file = finished[0] / "model.acf"
    arrays = {
        "shape": (np.zeros((3, 1, 9, 9), np.float32), r"one or more samples of shape \(1, 8, 8\), found .*9"),
        "empty": (np.zeros((0, 1, 8, 8), np.float32), "one or more samples"),
        "dtype": (np.zeros((1, 8, 8), np.int64), "expected uint8 or floating-point numbers, found int64"),
        "nan": (np.full((1, 8, 8), np.nan), "NaN or infinity"),
        "pickle": (np.array([{}]), r"expected a \.npy array of numbers"),
    }
    np.save(tmp_path / "good.npy", digits.images)
    assert len(predicted(file, tmp_path / "good.npy")) == len(digits.images), "it is the file beside it that is wrong"
    for name, (array, message) in arrays.items():
        path = tmp_path / f"{name}.npy"
        np.save(path, array, allow_pickle=True)
        fails(run("predict", file, tmp_path / "good.npy", path), rf"{name}\.npy: .*{message}")
    (tmp_path / "text.png").write_text("no picture")
    fails(run("predict", file, tmp_path / "text.png"), r"text\.png: expected a readable image")
    (tmp_path / "text.acf").write_text("no network, whatever it is named")
    fails(run("predict", tmp_path / "text.acf", tmp_path / "good.npy"), r"text\.acf: ")
    fails(run("predict", file, "--data", mnist), r"takes inputs \(1, 8, 8\), the images of .* are \(1, 28, 28\)")


def test_predict_needs_no_torch(finished, digits, run_python, tmp_path):
    np.save(tmp_path / "x.npy", digits.images)
    arguments = ["predict", str(finished[0] / "model.acf"), str(tmp_path / "x.npy"), "--json"]
    result = run_python(
        "import sys\nfor absent in ('torch', 'sklearn', 'scipy', 'PIL', 'matplotlib'): sys.modules[absent] = None\n"
        f"sys.argv[1:] = {arguments!r}\nfrom autocompress_fast.cli import app; app()"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == run(*arguments).stdout


# ---- demo


@pytest.mark.slow
def test_demo(tmp_path):
    result = run("demo", "--workdir", tmp_path / "demo", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["rates"]["params"] >= 8
    assert printed["max_difference"] < 1e-4
    assert printed["engine"]["agrees"]
    assert printed["accuracy"]["base_test"] > 97
    assert printed["accuracy"]["final_test"] > printed["accuracy"]["base_test"] - 2.5, "another CPU, other rounding"
    assert acf.load(tmp_path / "demo" / "model.acf").weights.kept <= 13584 / 8


# ---- quantize


def test_compress_to_8_bits(tmp_path):
    options = ["--activation-bits", "8", "--activation-epochs", "1", "--activation-lr", "1e-4"]
    result = run(*DIGITS, *QUICK, *options, "--workdir", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["engine"]["agrees"]
    assert found["engine"]["accuracy"] == pytest.approx(found["accuracy"]["final_test"])
    assert "8-bit weights and activations: " in result.stderr
    engine = acf.load(tmp_path / "model.acf")
    assert {step.storage for step in engine.summary().steps if step.weights} <= {
        "dense 8-bit",
        "columns 8-bit",
        "sparse",
    }
    assert engine.info["provenance"]["quantization"]["method"] == "mse"
    assert found["bytes"] < found["dense_bytes"] / 5


def test_compress_to_bits_of_single_layers(tmp_path):
    options = ["--bits", "conv1=3", "--bits", "fc*=1:4", "--quantize-epochs", "0"]
    result = run(*DIGITS, *QUICK, *options, "--workdir", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = {name: layer.get("bits") for name, layer in json.loads(result.stdout)["layers"].items()}
    assert (found.pop("conv1"), found.pop("conv2")) == (3, None)
    assert all(1 <= bits <= 4 for bits in found.values())
    assert "bits: conv1 3, fc1" in result.stderr


@pytest.mark.parametrize("given", [["4", "4"], ["conv1=4", "3"], ["conv1=4:"], ["four"], ["4", "fc1=3"], ["1:2:3"]])
def test_bits_that_make_no_sense_are_refused(given, tmp_path):
    options = [part for text in given for part in ("--bits", text)]
    result = run(*DIGITS, *options, "--workdir", tmp_path / "run")
    fails(result, f"--bits is BITS, FEWEST:MOST, or PATTERN=BITS .*got '{re.escape(given[-1])}'")
    assert not list(tmp_path.iterdir())


def test_quantize_with_data(finished, tmp_path):
    file, path = finished[0] / "model.acf", tmp_path / "small.acf"
    result = run("quantize", file, "-o", path, "--data", "digits", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bytes"] == path.stat().st_size < found["bytes_before"] == file.stat().st_size
    assert (found["layers"], found["float32"], found["method"], found["samples"]) == (4, [], "mse", 512)
    assert found["images"] == len(acf.data.digits().validation)
    assert found["accuracy_before"] > 50
    assert found["accuracy"] > found["accuracy_before"] - 3
    small, data = acf.load(path), acf.data.digits().validation
    assert 100 * (small(data.normalized()).argmax(1) == data.labels).mean() == pytest.approx(found["accuracy"])
    assert small.info["provenance"]["quantization"]["samples"] == 512
    assert "accuracy" not in small.info
    timed = run("bench", path, "--rounds", "1", "--threads", "1")
    assert timed.exit_code == 0, timed.output
    checked = json.loads(run("predict", path, "--data", "digits", "--json").stdout)
    assert checked["recorded_accuracy"] is None
    assert checked["accuracy"] > 50


def test_quantize_with_files(finished, digits, tmp_path):
    file, path = finished[0] / "model.acf", tmp_path / "small.acf"
    names = [step.name for step in acf.load(file).program.steps if step.op in ("conv", "linear")]
    np.save(tmp_path / "a.npy", digits.images[:8])
    np.save(tmp_path / "b.npy", digits.images[8:])
    options = ["--method", "percentile", "--percentile", "99.9", "--skip", names[0], "--output", path]
    result = run("quantize", file, tmp_path / "a.npy", tmp_path / "b.npy", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        f"3 of 4 layers with 8-bit weights and activations (percentile, 12 samples); in float32: {names[0]}\n"
    )
    assert "accuracy" not in result.stdout
    wanted = acf.quantize(acf.load(file), digits.normalized(), method="percentile", percentile=99.9, skip=names[0])
    found = acf.load(path)(digits.normalized())
    np.testing.assert_allclose(found, wanted(digits.normalized()), atol=0.02 * np.abs(found).max())


def test_quantize_what_cannot_be(finished, tmp_path):
    file, path = finished[0] / "model.acf", tmp_path / "small.acf"
    for arguments, message in (
        (["--data", "digits"], "quantize needs -o with the file to write"),
        (["-o", path], "either --data with a data set or INPUT files"),
        (["1.npy", "--data", "digits", "-o", path], "either --data with a data set or INPUT files"),
        (["--data", "digits", "-o", tmp_path / "x.onnx"], "x.onnx must end in .acf"),
        (["--data", "digits", "-o", path, "--skip", "nothing"], "skip names 'nothing', which no layer matches"),
        (["--data", "digits", "-o", path, "--method", "best"], "method must be one of mse, minmax, percentile"),
        (["--data", "digits", "-o", path, "--residual-bits", "4"], "residual_bits must be 8 or 32, got 4"),
    ):
        fails(run("quantize", file, *arguments), message)
    assert list(tmp_path.iterdir()) == []


# ---- bench, export


def test_bench_beside_the_dense_network(finished):
    file = finished[0] / "model.acf"
    options = "--dense lenet_digits --batch 1 --batch 3 --rounds 2 --threads 1 --data digits --json"
    result = run("bench", file, *options.split())
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = [(row["network"], row["runtime"], row["samples"]) for row in found["latencies"]]
    for samples in (1, 3):
        for expected in (("compressed", "autocompress_fast"), ("dense", "autocompress_fast"), ("dense", "torch")):
            assert (*expected, samples) in rows
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in found["latencies"])
    assert found["accuracy"]["accuracy"] > 50
    text = run("bench", file, "--rounds", "2", "--threads", "1").stdout
    assert "1 sample a call, 1 thread, float32, 2 calls each in turns" in text


def test_bench_tuned(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = run("bench", finished[0] / "model.acf", "--rounds", "2", "--threads", "1", "--tune").stdout
    assert "1 sample a call, 1 thread, float32, tuned, 2 calls each in turns" in text
    assert len(list((tmp_path / "autocompress_fast").glob("tuned-*.json"))) == 1


def test_bench_in_bfloat16(finished):
    result = run("bench", finished[0] / "model.acf", "--precision", "bfloat16", "--rounds", "2", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["precision"] == "bfloat16"
    refused = run("bench", finished[0] / "model.acf", "--precision", "half")
    assert refused.exit_code == 2
    assert "precision must be one of float32, bfloat16, not 'half'" in refused.stderr


def test_bench_against_what_is_not_there(finished):
    result = run("bench", finished[0] / "model.acf", "--against", "abacus")
    assert result.exit_code == 2
    assert "abacus is unknown; known are onnxruntime, openvino" in result.stderr


def test_export(finished, tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    assert run("export", finished[0] / "model.acf", path).exit_code == 0
    assert path.stat().st_size > 1000
    refused = run("export", finished[0] / "model.acf", tmp_path / "model.txt")
    assert refused.exit_code == 2
    assert "must end in .onnx" in refused.stderr
