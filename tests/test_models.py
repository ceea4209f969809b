"""Networks: published sizes, shapes, torch.export, checkpoints."""

import pickle
import subprocess
import sys
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn

from autocompress_fast import models
from autocompress_fast.models.lenet import DigitsNet, LeNet5, LeNet300
from autocompress_fast.models.mobilenet import InvertedResidual
from autocompress_fast.models.resnet import BasicBlock, Bottleneck, CifarResNet, ZeroPadShortcut
from autocompress_fast.models.vgg import VGG16


def counted(model, input_shape):
    """(CONV weights, all parameters, CONV MACs, all MACs) of a network on the meta device, by hooks."""
    macs = {nn.Conv2d: 0, nn.Linear: 0}

    def count(module, _inputs, output):
        macs[type(module)] += (
            output[0].numel() * module.weight[0].numel() if module.weight.ndim == 4 else (module.weight.numel())
        )

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *input_shape, device="meta"))
    conv = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Conv2d))
    return conv, sum(p.numel() for p in model.parameters()), macs[nn.Conv2d], sum(macs.values())


# CONV weights, parameters, CONV MACs, all MACs. Sources: 20-50-500-10 by hand; the CONV figures of VGG-16 (14.71 M,
# 313.2 M) and ResNet-18 (11.16 M, 555.4 M) are the pruning papers', the parameters of ResNet-20 to -110 (0.27, 0.46,
# 0.66, 0.85, 1.7 M) those of He et al. (2015); the ImageNet parameters are torchvision's to the last digit.
PUBLISHED = {
    "lenet5": (25_500, 431_080, 1_888_000, 2_293_000),
    "lenet300": (0, 266_610, 0, 266_200),
    "lenet_digits": (4_752, 13_706, 82_944, 91_776),
    "vgg16": (14_710_464, 14_724_042, 313_196_544, 313_201_664),
    "resnet18": (11_159_232, 11_173_962, 555_417_600, 555_422_720),
    "resnet20": (267_696, 269_722, 40_550_400, 40_551_040),
    "resnet32": (461_232, 464_154, 68_861_952, 68_862_592),
    "resnet44": (654_768, 658_586, 97_173_504, 97_174_144),
    "resnet56": (848_304, 853_018, 125_485_056, 125_485_696),
    "resnet110": (1_719_216, 1_727_962, 252_887_040, 252_887_680),
    "mobilenet_v2": (2_189_760, 2_236_682, 87_963_648, 87_976_448),
    "alexnet": (2_468_544, 61_100_840, 655_566_528, 714_188_480),
    "vgg16_imagenet": (14_710_464, 138_357_544, 15_346_630_656, 15_470_264_320),
    "resnet18_imagenet": (11_166_912, 11_689_512, 1_813_561_344, 1_814_073_344),
    "resnet50": (23_454_912, 25_557_032, 4_087_136_256, 4_089_184_256),
    "mobilenet_v2_imagenet": (2_189_760, 3_504_872, 299_494_272, 300_774_272),
}


def test_the_table_is_complete():
    assert set(PUBLISHED) == set(models.names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        model = models.create(name)
    assert counted(model, models.input_shape(name)) == PUBLISHED[name]


def test_lenet5_has_the_weights_of_the_papers():
    weights = [p.numel() for p in models.create("lenet5").parameters() if p.ndim > 1]
    assert weights == [500, 25_000, 400_000, 5_000]


def test_option_b_adds_a_convolution_where_the_shape_changes():
    with torch.device("meta"):
        conv, *_ = counted(models.create("resnet20", shortcut="B"), (3, 32, 32))
    assert conv == PUBLISHED["resnet20"][0] + 16 * 32 + 32 * 64


@pytest.mark.parametrize("name", PUBLISHED)
def test_classes_and_channels_are_free(name):
    _, *size = models.input_shape(name)
    with torch.device("meta"):
        model = models.create(name, classes=7, in_channels=2)
        assert model(torch.zeros(3, 2, *size)).shape == (3, 7)


# Whole networks where they are quick to export, otherwise the block that is special in them.
SMALL = {
    "lenet5": (LeNet5, (1, 28, 28)),
    "lenet5 with ReLUs": (partial(LeNet5, conv_relu=True), (1, 28, 28)),
    "lenet300": (LeNet300, (1, 28, 28)),
    "lenet_digits": (DigitsNet, (1, 8, 8)),
    "vgg16": (partial(VGG16, width=4), (3, 32, 32)),
    "resnet8 A": (partial(CifarResNet, depth=8, width=4), (3, 32, 32)),
    "resnet8 B": (partial(CifarResNet, depth=8, width=4, shortcut="B"), (3, 32, 32)),
    "basic block": (partial(BasicBlock, 4, 8, 2), (4, 8, 8)),
    "bottleneck": (partial(Bottleneck, 4, 8, 2), (4, 8, 8)),
    "inverted residual": (partial(InvertedResidual, 4, 4, 1, 6), (4, 8, 8)),
}


@pytest.mark.parametrize("name", SMALL)
def test_export_keeps_the_function_for_any_batch(name):
    torch.manual_seed(0)
    make, shape = SMALL[name]
    model = make()
    model.train()(torch.randn(16, *shape))  # running statistics other than 0 and 1
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, *shape)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(program.module()(x), expected)
    assert expected.std() > 0


@pytest.mark.parametrize("name", ["lenet5", "vgg16", "resnet20", "mobilenet_v2", "resnet18"])
def test_the_seed_decides_the_weights(name):
    options = {} if name in ("lenet5", "mobilenet_v2") else {"width": 4}
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().ravel() for p in models.create(name, **options).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_lenet5_fits_other_image_sizes():
    model = models.create("lenet5", image_size=32, in_channels=3)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size must be 16 or more, got 15"):
        models.create("lenet5", image_size=15)


def test_only_conv_relu_puts_relus_behind_lenets_convolutions():
    torch.manual_seed(0)
    plain, relu = models.create("lenet5"), models.create("lenet5", conv_relu=True)
    relu.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 28, 28)
    pool = nn.functional.max_pool2d
    y = pool(plain.conv2(pool(plain.conv1(x), 2)), 2).flatten(1)
    torch.testing.assert_close(plain(x), plain.fc2(plain.fc1(y).relu()))
    y = pool(plain.conv2(pool(plain.conv1(x).relu(), 2)).relu(), 2).flatten(1)
    torch.testing.assert_close(relu(x), plain.fc2(plain.fc1(y).relu()))


def test_the_zero_padded_shortcut():
    x = torch.randn(2, 3, 7, 8)
    y = ZeroPadShortcut(2, 1, 2)(x)
    assert y.shape == (2, 6, 4, 4)
    assert torch.equal(y[:, 1:4], x[:, :, ::2, ::2])
    assert not y[:, [0, 4, 5]].any()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("lenet", {}, ValueError, "unknown model 'lenet'; known are lenet5, lenet300"),
        ("resnet20", {"shortcut": "C"}, ValueError, "shortcut must be 'A' or 'B', got 'C'"),
        ("resnet20", {"depth": 21}, TypeError, "resnet20 has no option 'depth'; it has shortcut, width"),
        ("lenet_digits", {"width": 2}, TypeError, "no option 'width'; it has none"),
        ("lenet5", {"classes": 0}, ValueError, "classes must be 1 or more, got 0"),
        ("lenet5", {"in_channels": 1.0}, TypeError, r"in_channels must be an int, got 1\.0"),
    ],
)
def test_wrong_requests_say_what_is_allowed(name, options, error, message):
    with pytest.raises(error, match=message):
        models.create(name, **options)


def test_the_names_are_known_without_torch():
    program = "import sys; sys.modules['torch'] = None; from autocompress_fast import models; print(models.names())"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "lenet5" in printed


# checkpoints


@pytest.fixture
def trained():
    torch.manual_seed(3)
    model = CifarResNet(depth=8, width=4)
    model(torch.randn(8, 3, 32, 32))  # moves the running statistics
    return model.eval()


def same_function(first, second):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [("", None), ("module.", "state_dict"), ("_orig_mod.", "model"), ("module._orig_mod.", None)],
)
def test_checkpoints_load_however_they_were_wrapped(tmp_path, trained, prefix, wrapper, zipped):
    state = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    content = state if wrapper is None else {wrapper: state, "best_prec1": 91.7}
    torch.save(content, tmp_path / "weights.th", _use_new_zipfile_serialization=zipped)
    model = CifarResNet(depth=8, width=4)
    assert models.load_pretrained(model, tmp_path / "weights.th") == models.Loaded((), ())
    assert same_function(model, trained)


def test_safetensors_and_files_without_batch_counters_load(tmp_path, trained):
    state = {name: t for name, t in trained.state_dict().items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    model = CifarResNet(depth=8, width=4)
    models.load_pretrained(model, str(tmp_path / "weights.safetensors"))
    assert same_function(model, trained)


def test_a_prefix_that_the_model_has_stays(tmp_path, trained):
    wrapped = nn.DataParallel(CifarResNet(depth=8, width=4))
    torch.save(nn.DataParallel(trained).state_dict(), tmp_path / "weights.th")
    assert models.load_pretrained(wrapped, tmp_path / "weights.th") == models.Loaded((), ())
    assert same_function(wrapped.module, trained)


def test_names_of_the_widespread_cifar_checkpoints():
    names = set(models.create("resnet20").state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.weight"} <= names
    assert not any("shortcut" in name for name in names)
    assert "layer2.0.shortcut.0.weight" in models.create("resnet20", shortcut="B").state_dict()


def test_missing_unexpected_and_misshapen_weights_are_named_and_nothing_changes(tmp_path, trained):
    state = trained.state_dict()
    state["extra"] = torch.zeros(1)
    del state["conv1.weight"]
    torch.save(state, tmp_path / "weights.th")
    model = CifarResNet(depth=8, width=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit CifarResNet: missing: conv1\.weight; unexpected: extra"):
        models.load_pretrained(model, tmp_path / "weights.th")
    state["linear.weight"] = torch.zeros(10, 17)
    torch.save(state, tmp_path / "shapes.th")
    with pytest.raises(ValueError, match=r"shapes differ: linear.weight is \(10, 17\), the model's \(10, 16\)"):
        models.load_pretrained(model, tmp_path / "shapes.th", strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    found = models.load_pretrained(model, tmp_path / "weights.th", strict=False)
    assert found == models.Loaded(("conv1.weight",), ("extra",))
    assert torch.equal(model.conv1.weight, before["conv1.weight"])
    assert torch.equal(model.linear.weight, trained.linear.weight)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_no_checkpoint_are_refused_and_run_nothing(tmp_path, trained):
    path, canary = tmp_path / "weights.th", tmp_path / "canary"
    model = CifarResNet(depth=8, width=4)
    torch.save(trained.state_dict(), path)
    whole = path.read_bytes()
    contents = [b"", b"no checkpoint", whole[:1000], whole[: len(whole) // 2], pickle.dumps({"a": Touch(canary)})]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.th: expected a state_dict of tensors, which is not read"):
            models.load_pretrained(model, path)
    path.write_bytes(b"")
    torch.save({"state_dict": {"a": Touch(canary)}}, path)
    with pytest.raises(ValueError, match="which is not read"):
        models.load_pretrained(model, path)
    assert not canary.exists()

    for content, message in (({}, "without names"), ([1], "found list"), ({"a": 3}, "found int at 'a'")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            models.load_pretrained(model, path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no weight of CifarResNet"):
        models.load_pretrained(model, path, strict=False)
    with pytest.raises(ValueError, match="expected a checkpoint file, found none"):
        models.load_pretrained(model, tmp_path / "missing.th")
    (tmp_path / "damaged.safetensors").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="which is not read"):
        models.load_pretrained(model, tmp_path / "damaged.safetensors")
