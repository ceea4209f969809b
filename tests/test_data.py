"""Data sets: cuts, batches, augmentation, files good and damaged, pickles harmless and hostile."""

import contextlib
import gzip
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest
import torch

from autocompress_fast import data
from autocompress_fast.data import Augmentation, BatchLoader, DataError, Dataset, UserBatches
from autocompress_fast.data._pickle import load_pickle

RNG = np.random.default_rng(0)


def make_dataset(count=60, classes=5, shape=(3, 8, 8), dtype=np.uint8):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, *shape)).astype(dtype)
    names = tuple("abcdefghij"[:classes])
    return Dataset(images, rng.integers(0, classes, count), names, (0.4,) * shape[0], (0.2,) * shape[0])


def identify(dataset):
    """Every image as bytes; random images of this size do not repeat."""
    return [image.tobytes() for image in dataset.images]


# Dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 8, 8), np.uint8)}, r"\(N, C, H, W\), got uint8 \(4, 8, 8\)"),
        ({"images": np.zeros((4, 1, 8, 8), np.float64)}, "got float64"),
        ({"images": np.zeros((0, 1, 8, 8), np.uint8)}, "non-empty"),
        ({"images": np.full((4, 1, 2, 2), np.nan, np.float32)}, "image 0 has NaN"),
        ({"labels": np.zeros(3, np.int64)}, "expected 4 labels, one for each image, found 3"),
        ({"labels": np.zeros(4)}, "row of integers, found float64"),
        ({"labels": np.array([0, 1, 2, 1])}, "labels from 0 to 1, found 2 at image 2"),
        ({"labels": np.array([0, -1, 0, 1])}, "found -1 at image 1"),
        ({"mean": (0.0, 0.0)}, "one number for each of 1 channels"),
        ({"std": (0.0,)}, "std positive"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
    ],
)
def test_dataset_refuses_what_does_not_fit(change, message):
    good = {
        "images": np.zeros((4, 1, 8, 8), np.uint8),
        "labels": np.array([0, 1, 0, 1], np.uint8),
        "classes": ("a", "b"),
        "mean": (0.0,),
        "std": (1.0,),
    }
    assert Dataset(**good).labels.dtype == np.int64
    with pytest.raises(DataError, match=message):
        Dataset(**{**good, **change})


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalized_is_the_formula(dtype):
    dataset = make_dataset(dtype=dtype).with_normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    pixels = dataset.images.astype(np.float64) / (255 if dtype == np.uint8 else 1)
    expected = (pixels - np.reshape([0.1, 0.2, 0.3], (3, 1, 1))) / np.reshape([0.5, 0.6, 0.7], (3, 1, 1))
    found = dataset.normalized()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dataset.normalized([3, 1]), found[[3, 1]])


# cuts


def test_split_is_disjoint_complete_exact_and_stratified():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        dataset = make_dataset(int(rng.integers(10, 200)), int(rng.integers(1, 6)))
        count = int(rng.integers(1, len(dataset)))
        size = count if seed % 2 else count / len(dataset)
        rest, cut = data.split(dataset, size, seed=seed)
        assert len(cut) == count, seed
        assert sorted(identify(rest) + identify(cut)) == sorted(identify(dataset)), seed
        per_class = np.bincount(dataset.labels, minlength=len(dataset.classes)) * count / len(dataset)
        assert np.abs(np.bincount(cut.labels, minlength=len(dataset.classes)) - per_class).max() < 1, seed
        again = data.split(dataset, size, seed=seed)
        np.testing.assert_array_equal(again[1].images, cut.images)


def test_split_draws_other_images_for_another_seed_and_keeps_labels_with_images():
    dataset = make_dataset(200)
    label_of = dict(zip(identify(dataset), dataset.labels.tolist(), strict=True))
    cuts = [data.split(dataset, 50, seed=seed)[1] for seed in (0, 1)]
    assert set(identify(cuts[0])) != set(identify(cuts[1]))
    for cut in cuts:
        assert [label_of[key] for key in identify(cut)] == cut.labels.tolist()


def test_split_is_the_same_on_every_machine():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    cut = data.split(Dataset(images, np.arange(40) % 2, ("a", "b"), (0.0,), (1.0,)), 6, seed=3)[1]
    assert cut.images.ravel().tolist() == [8, 9, 26, 27, 34, 39]


@pytest.mark.parametrize("size", [0, 60, -1, 0.0, 1.0, 1e-9, float("nan")])
def test_split_refuses_empty_parts(size):
    with pytest.raises(ValueError, match="count from 1 to 59 or a share"):
        data.split(make_dataset(60), size, seed=0)


@pytest.mark.parametrize("size", [True, "0.1", None])
def test_split_refuses_what_is_no_number(size):
    with pytest.raises(TypeError, match="count"):
        data.split(make_dataset(60), size, seed=0)


def test_from_arrays_takes_tensors_and_measures_the_training_part():
    x = torch.rand(50, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    y = torch.arange(50) % 3
    splits = data.from_arrays(x, y, test=(x[:5], y[:5]), validation=10, classes=["r", "g", "b"])
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 10, 5]
    assert splits.classes == ("r", "g", "b")
    normalized = splits.train.normalized()
    np.testing.assert_allclose(normalized.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(axis=(0, 2, 3)), 1, atol=1e-5)
    assert splits.test.mean == splits.train.mean


def test_from_arrays_keeps_a_constant_channel_and_gives_grey_images_a_channel():
    splits = data.from_arrays(np.full((20, 4, 4), 7, np.uint8), np.arange(20) % 2)
    assert splits.input_shape == (1, 4, 4)
    np.testing.assert_allclose(splits.train.normalized(), 0, atol=1e-6)


def test_from_arrays_names_what_does_not_fit():
    x, y = np.zeros((20, 1, 4, 4), np.float32), np.arange(20) % 2
    with pytest.raises(DataError, match="expected 20 labels, one for each image, found 19"):
        data.from_arrays(x, y[:19])
    with pytest.raises(DataError, match="test has input_shape"):
        data.from_arrays(x, y, test=(np.zeros((4, 1, 5, 5), np.float32), y[:4]))
    with pytest.raises(DataError, match="test must be a pair"):
        data.from_arrays(x, y, test=(x, y, y))


# batches


def epoch_arrays(loader, index=0):
    x, y = zip(*loader.epoch(index), strict=True)
    return torch.cat(x).numpy(), torch.cat(y).numpy()


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_every_image_once_with_its_label(shuffle):
    dataset = make_dataset(61)
    loader = BatchLoader(dataset, 8, shuffle=shuffle, seed=3)
    batches = list(loader.epoch(2))
    assert [len(y) for _, y in batches] == [8] * 7 + [5]
    assert len(loader) == len(batches)
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    label_of = dict(zip((i.tobytes() for i in dataset.normalized()), dataset.labels.tolist(), strict=True))
    x, y = epoch_arrays(loader, 2)
    assert len({image.tobytes() for image in x}) == 61
    assert [label_of[image.tobytes()] for image in x] == y.tolist()
    assert np.array_equal(x, dataset.normalized()) is not shuffle


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    dataset = make_dataset(50)
    options = {"shuffle": True, "augmentation": Augmentation(shift=2, flip=True, rotation=20, scale=0.2, elastic=0.5)}
    first = BatchLoader(dataset, 16, seed=5, **options)
    for epoch in range(2):  # reading earlier epochs must leave no trace
        list(first.epoch(epoch))
    torch.manual_seed(99)
    again = BatchLoader(dataset, 16, seed=5, **options)
    np.testing.assert_array_equal(epoch_arrays(first, 2)[0], epoch_arrays(again, 2)[0])
    assert not np.array_equal(epoch_arrays(first, 2)[1], epoch_arrays(first, 3)[1])
    assert not np.array_equal(
        epoch_arrays(first, 2)[1], epoch_arrays(BatchLoader(dataset, 16, seed=6, **options), 2)[1]
    )


def test_drop_last_and_bad_arguments():
    dataset = make_dataset(20)
    loader = BatchLoader(dataset, 8, drop_last=True)
    assert [len(y) for _, y in loader] == [8, 8]
    with pytest.raises(ValueError, match="leaves none of the 20"):
        BatchLoader(dataset, 21, drop_last=True)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        BatchLoader(dataset, 0)
    with pytest.raises(TypeError, match="batch_size must be an int, got 2"):
        BatchLoader(dataset, 2.5)
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        BatchLoader(dataset, 4, seed=-1)
    with pytest.raises(TypeError, match="must be a Dataset, got list"):
        BatchLoader([], 4)


def test_the_loader_leaves_the_images_alone():
    dataset = make_dataset(20)
    before = dataset.images.copy()
    list(BatchLoader(dataset, 20, augmentation=Augmentation(flip=True, rotation=10)).epoch(0))
    np.testing.assert_array_equal(dataset.images, before)


# augmentation


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_shift_and_flip_give_a_window_of_the_padded_image_or_its_mirror(shift, flip, dtype):
    images = RNG.integers(1, 256, (200, 2, 4, 5)).astype(dtype)
    seen = set()
    found = Augmentation(shift=shift, flip=flip).shift_and_flip(images, np.random.default_rng(1))
    assert found.shape == images.shape
    assert found.dtype == dtype
    for image, changed in zip(images, found, strict=True):
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)))
        candidates = [
            (top, left, mirrored)
            for top in range(2 * shift + 1)
            for left in range(2 * shift + 1)
            for mirrored in (False, True)[: 1 + flip]
            if np.array_equal(changed, padded[:, top : top + 4, left : left + 5][:, :, :: -1 if mirrored else 1])
        ]
        assert candidates
        seen.update(candidates[:1])
    assert len(seen) >= min(30, (2 * shift + 1) ** 2 * (1 + flip))


class FixedDraws:
    """A generator whose uniform() gives what the test wants."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, _low, _high, count):
        return np.full(count, self.values.pop(0))


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(6, 6), (6, 10), (10, 6)])
def test_rotation_turns_the_middle_of_the_image(shape, quarter_turns):
    images = np.zeros((3, 2, *shape), np.float32)
    middle = RNG.random((3, 2, 6, 6)).astype(np.float32)
    top, left = (shape[0] - 6) // 2, (shape[1] - 6) // 2
    images[:, :, top : top + 6, left : left + 6] = middle
    turned = Augmentation(rotation=360, scale=0.5).resample(
        torch.from_numpy(images), FixedDraws(90.0 * quarter_turns, 1.0)
    )
    found = turned.numpy()[:, :, top : top + 6, left : left + 6]
    np.testing.assert_allclose(found, np.rot90(middle, quarter_turns, axes=(2, 3)), atol=1e-4)


def test_scale_enlarges_about_the_middle():
    image = torch.zeros(1, 1, 16, 16)
    image[:, :, 6:10, 6:10] = 1
    areas = [Augmentation(scale=0.5).resample(image, FixedDraws(0.0, factor)).sum().item() for factor in (0.5, 1, 1.5)]
    np.testing.assert_allclose(areas, [4, 16, 36], rtol=0.15)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 34)])
def test_elastic_distortions_move_neighbours_alike(height, width):
    """Two ramps say where each pixel came from: as far as was asked for, everywhere, far apart independently."""
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramps = torch.stack([across, down]).float().expand(400, 2, height, width)
    changed = Augmentation(elastic=0.7).resample(ramps, np.random.default_rng(0))
    moved = (changed - ramps)[:, :, 4:-4, 4:-4]  # beyond lies nothing to come from
    assert moved.mean().abs() < 0.05
    torch.testing.assert_close(moved.std(dim=0), torch.full_like(moved[0], 0.7), atol=0.15, rtol=0)
    assert (moved[..., 1:] - moved[..., :-1]).std() < 0.35 * 0.7
    far = (moved[..., 0, 0] * moved[..., -1, -1]).mean() / 0.7**2
    assert far.abs() < 0.15
    assert (moved[:, 0] * moved[:, 1]).mean().abs() < 0.05


def test_small_rotation_and_scale_stay_within_their_limits():
    # Rows of the distance from the middle: after a turn by a and a scaling by s the slope along x is cos(a) / s.
    ramp = (torch.arange(32, dtype=torch.float32) - 15.5).expand(256, 1, 32, 32)
    changed = Augmentation(rotation=20, scale=0.1).resample(ramp, np.random.default_rng(0))
    along_x = (changed[:, 0, 16, 20] - changed[:, 0, 16, 12]) / 8
    along_y = (changed[:, 0, 20, 16] - changed[:, 0, 12, 16]) / 8
    angle = torch.rad2deg(torch.atan2(along_y, along_x)).abs()
    factor = 1 / torch.hypot(along_x, along_y)
    assert 15 < angle.max() <= 20.01
    assert angle.min() < 3
    assert 0.899 <= factor.min() < 0.93
    assert 1.07 < factor.max() <= 1.101


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shift": -1}, ValueError, "shift must be 0 or more, got -1"),
        ({"shift": 1.5}, TypeError, "shift must be int, got 1.5"),
        ({"shift": True}, TypeError, "shift must be int"),
        ({"flip": 1}, TypeError, "flip must be bool, got 1"),
        ({"rotation": float("nan")}, ValueError, "rotation must be 0 or more"),
        ({"elastic": -0.5}, ValueError, "elastic must be 0 or more"),
        ({"rotation": "10"}, TypeError, "rotation must be float"),
        ({"scale": 1.0}, ValueError, "scale must be less than 1"),
    ],
)
def test_augmentation_is_validated(options, error, message):
    with pytest.raises(error, match=message):
        Augmentation(**options)


# the user's own batches


class NoisySet(torch.utils.data.Dataset):
    """Draws from all three global generators, as transforms of users do."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        noise = torch.rand(()).item() + np.random.random() + random.random()  # noqa: NPY002
        return torch.full((1, 2, 2), index + noise), index % 3


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffling_data_loader_repeats_an_epoch(own_generator):
    generator = torch.Generator() if own_generator else None
    loader = torch.utils.data.DataLoader(NoisySet(), batch_size=6, shuffle=True, generator=generator)
    batches = UserBatches(loader, seed=4)
    assert len(batches) == 4
    straight = [epoch_arrays(batches, index)[0] for index in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(epoch_arrays(batches, 2)[0], straight[2])
    assert not np.array_equal(straight[1].round(), straight[2].round())


def test_the_users_loader_leaves_the_global_generators_alone():
    loader = UserBatches(torch.utils.data.DataLoader(NoisySet(), batch_size=5, shuffle=True))
    states = []
    for reads in (True, False):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        steps = loader.epoch(0) if reads else range(4)
        draws = [(torch.rand(()).item(), np.random.random(), random.random()) for _ in steps]  # noqa: NPY002
        states.append(draws)
    assert states[0] == states[1]


def test_a_distributed_sampler_is_told_the_epoch():
    sampler = torch.utils.data.DistributedSampler(NoisySet(), num_replicas=2, rank=0)
    loader = UserBatches(torch.utils.data.DataLoader(NoisySet(), batch_size=5, sampler=sampler))
    list(loader.epoch(7))
    assert sampler.epoch == 7


def test_one_shot_iterators_and_unknown_lengths_are_refused_with_advice():
    pairs = [(torch.zeros(2, 1), torch.zeros(2))]
    with pytest.raises(TypeError, match="one-shot generator"):
        UserBatches(pair for pair in pairs)
    with pytest.raises(TypeError, match="one-shot list_iterator"):
        data.batches(iter(pairs))
    with pytest.raises(TypeError, match="iterable of"):
        UserBatches(3)

    class Endless:
        def __iter__(self):
            while True:
                yield pairs[0]

    with pytest.raises(TypeError, match="say it: length"):
        UserBatches(Endless())
    assert len(list(UserBatches(Endless(), length=3).epoch(0))) == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 1), "batch 1 must be a pair .* found Tensor"),
        ((torch.zeros(2, 1),), "found tuple of 1"),
        ({"x": 1, "y": 2}, "found dict of 2"),
        ((torch.zeros(2, 1), torch.zeros(3)), "as many images as labels"),
        ((torch.zeros(0, 1), torch.zeros(0)), "as many images as labels"),
        ((torch.zeros(()), torch.zeros(())), "as many images as labels"),
    ],
)
def test_a_wrong_batch_is_named(batch, message):
    good = (np.zeros((2, 1), np.float32), np.zeros(2, np.int64))
    iterator = UserBatches([good, batch]).epoch(0)
    assert all(isinstance(part, torch.Tensor) for part in next(iterator))
    with pytest.raises(DataError, match=message):
        next(iterator)


def test_an_epoch_shorter_than_promised_is_an_error():
    with pytest.raises(DataError, match="epoch 0 ended after 1 batches, expected 2"):
        list(UserBatches([(torch.zeros(2, 1), torch.zeros(2))], length=2).epoch(0))


def test_batches_takes_what_it_is_given():
    loader = data.batches(make_dataset(20), 8, shuffle=True)
    assert isinstance(loader, BatchLoader)
    assert loader.shuffle
    assert data.batches(loader) is loader
    assert isinstance(data.batches([(torch.zeros(2, 1), torch.zeros(2))]), UserBatches)
    counting = torch.utils.data.DataLoader(NoisySet())
    counting.epoch = 3
    assert isinstance(data.batches(counting), UserBatches)
    with pytest.raises(TypeError, match="got NoisySet; a torch Dataset goes into a DataLoader first"):
        data.batches(NoisySet())


# MNIST


def write_idx(path, array):
    content = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_mnist(folder, suffix=""):
    rng = np.random.default_rng(1)
    written = {}
    for prefix, count in (("train", 30), ("t10k", 10)):
        written[prefix] = (
            rng.integers(0, 256, (count, 28, 28)).astype(np.uint8),
            rng.integers(0, 10, count).astype(np.uint8),
        )
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", written[prefix][0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", written[prefix][1])
    return written


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sub", [".", "raw", "MNIST/raw"])
def test_mnist_is_found_and_read(tmp_path, sub, suffix):
    written = write_mnist(tmp_path / sub, suffix)
    splits = data.load(tmp_path, validation=6, seed=2)
    assert (splits.name, splits.input_shape, len(splits.classes)) == ("mnist", (1, 28, 28), 10)
    np.testing.assert_array_equal(splits.test.images[:, 0], written["t10k"][0])
    np.testing.assert_array_equal(splits.test.labels, written["t10k"][1])
    assert len(splits.validation) == 6
    assert sorted(identify(splits.train) + identify(splits.validation)) == sorted(
        image.tobytes() for image in written["train"][0]
    )


def test_fashion_mnist_is_known_by_its_folder_or_by_name(tmp_path):
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    assert data.load(tmp_path).classes[9] == "Ankle boot"
    assert data.load(tmp_path / "FashionMNIST").name == "fashion-mnist"
    write_mnist(tmp_path / "other")
    assert data.load(tmp_path / "other", dataset="fashion-mnist").name == "fashion-mnist"
    assert data.load_fashion_mnist(tmp_path / "other").classes[0] == "T-shirt/top"


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (IMAGES, lambda c: c[:-1], "expected 23520 bytes for shape .* found 23519"),
        (IMAGES, lambda c: c[:16], "found 0"),
        (IMAGES, lambda c: c[:15], "in 15 header bytes"),
        (IMAGES, lambda _: b"", "found an empty file"),
        (IMAGES, lambda c: c + b"\0", "expected 23520 bytes for shape .* found more"),
        (IMAGES, lambda c: b"\0\0\x0d\x03" + c[4:], "magic 0x00000803.* found 00000d03"),
        (IMAGES, lambda c: c[:4] + b"\xff" * 12 + c[16:], "found 23520"),
        (IMAGES, lambda c: c[:4] + b"\0" * 4 + c[8:16], "expected 0 bytes"),
        (LABELS, lambda c: c[:8] + b"\x0a" + c[9:], "labels from 0 to 9, found 10 at image 0"),
        (LABELS, lambda c: struct.pack(">II", 0x801, 29) + c[8:-1], "expected 30 labels, one for each image, found 29"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, file, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        data.load_mnist(tmp_path)
    assert str(path) in str(caught.value)


def test_a_missing_idx_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(DataError, match=rf"{LABELS}: expected this file .or {LABELS}.gz., found none"):
        data.load(tmp_path)


def test_no_cut_of_a_gz_file_is_taken_for_a_whole_one(tmp_path):
    write_mnist(tmp_path, ".gz")
    path = tmp_path / (LABELS + ".gz")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=LABELS):
            data.load_mnist(tmp_path)
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 255]) + whole[21:])
    with pytest.raises(DataError, match=LABELS):
        data.load_mnist(tmp_path)


# CIFAR


def cifar_rows(count, classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072)).astype(np.uint8), rng.integers(0, classes, count).tolist()


def python2_pickle(images, labels, labels_key):
    """What Python 2 and its numpy wrote, protocol 2: str for names and for the bytes of the array."""
    entry = lambda name: b"U" + bytes([len(name)]) + name.encode()  # noqa: E731
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + struct.pack("<cHcHc", b"M", images.shape[0], b"M", images.shape[1], b"\x86")
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", images.size)
        + images.tobytes()
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + entry("data") + array + entry(labels_key) + numbers + b"u."


def write_cifar(folder, version, protocol=4):
    """A small set in the given version; returns (images, labels) of train and test."""
    classes = 100 if "100" in version else 10
    parts = [cifar_rows(12, classes, seed) for seed in range(1 if classes == 100 else 5)]
    test = cifar_rows(8, classes, 9)
    place = folder / version
    place.mkdir(parents=True)
    binary = version.endswith(("bin", "binary"))
    stems = ["train"] if classes == 100 else [f"data_batch_{i}" for i in range(1, 6)]
    test_stem = "test" if classes == 100 else "test_batch"
    names = [f"class{i}" for i in range(classes)]
    key = "fine_labels" if classes == 100 else "labels"
    for stem, (images, labels) in zip([*stems, test_stem], [*parts, test], strict=True):
        if binary:
            columns = [np.array(labels, np.uint8)[:, None], images]
            if classes == 100:
                columns.insert(0, np.full((len(labels), 1), 255, np.uint8))  # the coarse label, which nobody reads
            (place / f"{stem}.bin").write_bytes(np.hstack(columns).tobytes())
        elif protocol == "python 2":
            (place / stem).write_bytes(python2_pickle(images, labels, key))
        else:
            content = {b"data": images, key.encode(): labels, b"filenames": ["a.png"] * len(labels), b"batch": 1}
            (place / stem).write_bytes(pickle.dumps(content, protocol=protocol))
    if binary:
        name_file = "fine_label_names.txt" if classes == 100 else "batches.meta.txt"
        (place / name_file).write_text("\n".join(names) + "\n\n")
    else:
        meta = {"fine_label_names" if classes == 100 else "label_names": names, "num_vis": 3072}
        (place / ("meta" if classes == 100 else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))
    merged = np.concatenate([images for images, _ in parts]), [label for _, labels in parts for label in labels]
    return merged, test


@pytest.mark.parametrize(
    ("version", "protocol"),
    [
        ("cifar-10-batches-bin", None),
        ("cifar-100-binary", None),
        *(
            (version, p)
            for version in ("cifar-10-batches-py", "cifar-100-python")
            for p in (0, 1, 2, 3, 4, 5, "python 2")
        ),
    ],
)
def test_cifar_is_found_and_read(tmp_path, version, protocol):
    (images, labels), test = write_cifar(tmp_path, version, protocol)
    for place in (tmp_path, tmp_path / version):
        splits = data.load(place, validation=0.25)
        assert splits.name == ("cifar100" if "100" in version else "cifar10")
        assert splits.classes[7] == "class7"
        np.testing.assert_array_equal(splits.test.images.reshape(8, 3072), test[0])
        assert splits.test.labels.tolist() == test[1]
        expected = dict(zip((row.tobytes() for row in images), labels, strict=True))
        found = {}
        for part in (splits.train, splits.validation):
            found.update(zip(identify(part), part.labels.tolist(), strict=True))
        assert found == expected
        assert len(splits.validation) == len(labels) // 4


def test_columns_in_fortran_order_and_numpy_labels_are_read(tmp_path):
    write_cifar(tmp_path, "cifar-10-batches-py")
    images, labels = cifar_rows(12, 10, 0)
    for protocol in (2, 4, 5):
        content = {"data": np.asfortranarray(images), "labels": np.array(labels, dtype=">i2")}
        (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
        test = data.load_cifar10(tmp_path).test
        np.testing.assert_array_equal(test.images.reshape(12, 3072), images)
        assert test.labels.tolist() == labels


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("data_batch_3.bin", lambda c: c[:-5], "rows of 3073 bytes, found 36871 bytes"),
        ("data_batch_3.bin", lambda _: b"", "found 0 bytes"),
        ("test_batch.bin", lambda c: c + b"\0", "rows of 3073 bytes"),
        ("data_batch_5.bin", lambda c: b"\x0a" + c[1:], "labels from 0 to 9, found 10 at image 0"),
        ("data_batch_2.bin", None, "expected this file of cifar10, found none"),
        ("batches.meta.txt", None, "expected this file with 10 class names, found none"),
        ("batches.meta.txt", lambda _: b"cat\ndog\n", "expected 10 class names, found 2"),
    ],
)
def test_damaged_binary_cifar_files_are_named(tmp_path, file, damage, message):
    write_cifar(tmp_path, "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin" / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        data.load(tmp_path)
    assert str(path) in str(caught.value)


GOOD_IMAGES, GOOD_LABELS = cifar_rows(4, 10, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": GOOD_LABELS}, "expected an entry 'data', found labels"),
        ({"data": GOOD_IMAGES}, "expected an entry 'labels', found data"),
        ({"data": GOOD_IMAGES, "labels": GOOD_LABELS[:3]}, "expected 4 labels, one for each image, found 3"),
        ({"data": GOOD_IMAGES, "labels": [0, 1, 2, 10]}, "found 10 at image 3"),
        ({"data": GOOD_IMAGES, "labels": [0, 1, 2, -1]}, "found -1 at image 3"),
        ({"data": GOOD_IMAGES, "labels": [0, 1, 2, 2**70]}, "more than 64 bits"),
        ({"data": GOOD_IMAGES, "labels": [0, 1, 2, "3"]}, "list of integers"),
        ({"data": GOOD_IMAGES, "labels": np.array([0.0, 1, 2, 3])}, "row of integers, found float64"),
        ({"data": GOOD_IMAGES.astype(np.int32), "labels": GOOD_LABELS}, "uint8 .N, 3072., found int32"),
        ({"data": GOOD_IMAGES[:, :-1], "labels": GOOD_LABELS}, r"found uint8 \(4, 3071\)"),
        ({"data": b"abc", "labels": GOOD_LABELS}, "found bytes"),
        ([1, 2], "expected a pickled dict, found list"),
    ],
)
def test_wrong_contents_of_a_cifar_pickle_are_named(tmp_path, content, message):
    write_cifar(tmp_path, "cifar-10-batches-py")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        data.load_cifar10(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("protocol", [0, 2, 5, "python 2"])
def test_no_cut_or_flipped_byte_of_a_pickle_escapes_as_another_error(tmp_path, protocol):
    images, labels = cifar_rows(1, 10, 3)
    content = (
        python2_pickle(images, labels, "labels")
        if protocol == "python 2"
        else pickle.dumps({"data": images, "labels": labels}, protocol=protocol)
    )
    path = tmp_path / "batch"
    rng = np.random.default_rng(0)
    lengths = {*range(120), *rng.integers(0, len(content), 40).tolist(), *range(len(content) - 60, len(content))}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="expected a pickle"):
            load_pickle(path)
    for position in sorted(lengths):
        path.write_bytes(content[:position] + bytes([rng.integers(256)]) + content[position + 1 :])
        with contextlib.suppress(DataError):
            load_pickle(path)


# hostile pickles


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(canary):
    """Pickles that create `canary` when they are run by an unguarded reader, and others that corrupt or exhaust it."""
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    for protocol in range(6):
        yield f"os.system, protocol {protocol}", pickle.dumps({"data": Calls(os.system, command)}, protocol=protocol)
        yield f"eval, protocol {protocol}", pickle.dumps([Calls(eval, code)], protocol=protocol)
    touch = command.encode()
    yield "INST", b"(S'" + touch + b"'\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nS'" + touch + b"'\no."
    yield "NEWOBJ", b"\x80\x02csubprocess\nPopen\n(S'" + touch + b"'\n\x88t\x81."
    yield "Python 2 eval", b"c__builtin__\neval\n(S'" + code.replace("'", '"').encode() + b"'\ntR."
    yield "dotted name", b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93\x8c" + bytes([len(touch)]) + touch + b"\x85R."
    yield "numpy function", b"cnumpy\nfromfile\n(S'/dev/null'\ntR."
    runstring = b"(cnumpy.testing._private.utils\nrunstring\nS'" + code.replace("'", '"').encode() + b"'\n}tR."
    yield "numpy.testing.runstring", runstring
    yield "getattr", b"cbuiltins\ngetattr\n(cnumpy\ndtype\nS'mro'\ntR."
    yield "call of ndarray", b"cnumpy\nndarray\n(K\x01tR."
    yield "state of a function", b"cnumpy.core.multiarray\n_reconstruct\n}S'__code__'\nK\x01sb."
    yield "function as a value", b"(dS'data'\ncnumpy\nndarray\ns."
    yield "array without state", b"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(tRs."
    yield "objects in an array", pickle.dumps({"data": np.array([Calls(os.system, command)], dtype=object)})
    yield "plain objects in an array", pickle.dumps({"data": np.array([1, "a"], dtype=object)})
    yield "records in an array", pickle.dumps({"data": np.zeros(2, dtype=[("a", "u1")])})
    pointer = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\nK\x00K\x01tRS'AAAAAAAA'\ntR."
    yield "pointer as a scalar", pointer
    yield "codec", b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR."
    yield "extension", b"\x82\x01."
    yield "persistent id", b"P1\n."
    yield "memo bomb", b"\x80\x02]r\xff\xff\xff\x7f."
    yield "length bomb", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."
    huge = b"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(tR(K\x01(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft"
    yield "shape bomb", huge + b"cnumpy\ndtype\n(S'f8'\ntRI00\nS'a'\ntbs."
    yield (
        "negative shape",
        b"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(tR(K\x01(J\xff\xff\xff\xfft"
        + (b"cnumpy\ndtype\n(S'u1'\ntRI00\nS''\ntbs."),
    )
    yield "second pickle behind the first", pickle.dumps({}) + pickle.dumps(Calls(os.system, command))


def test_the_hostile_pickles_are_dangerous_to_an_unguarded_reader(tmp_path):
    canary = tmp_path / "canary"
    ran = 0
    for name, content in hostile(canary):
        if name.startswith(("os.system", "eval", "INST", "OBJ")):
            pickle.loads(content)
            assert canary.exists(), name
            canary.unlink()
            ran += 1
    assert ran == 14


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "data_batch_1"
    for name, content in hostile(canary):
        path.write_bytes(content)
        with pytest.raises(DataError, match="expected a pickle of numpy arrays, bytes, str, list, dict, int, found"):
            pytest.fail(f"{name} was read as {load_pickle(path)!r}")
        assert not canary.exists(), name


def test_a_nest_of_lists_does_not_grow(tmp_path):
    # 200 lists, each holding the one before twice: 2^200 items if they were copied.
    content = b"\x80\x02}U\x01a]q\x00" + b"0](h\x00h\x00eq\x00" * 200 + b"s."
    path = tmp_path / "nest"
    path.write_bytes(content)
    assert len(load_pickle(path)["a"]) == 2


# folders of images


def write_images(folder, classes=("cat", "dog"), count=5, mode="RGB", size=(8, 6), seed=0):
    rng = np.random.default_rng(seed)
    written = {}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            pixels = rng.integers(0, 256, shape).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
            written[pixels.reshape(size[1], size[0], -1).transpose(2, 0, 1).tobytes()] = name
    return written


def named(dataset):
    return dict(zip(identify(dataset), (dataset.classes[label] for label in dataset.labels), strict=True))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_train_validation_and_test_folders_are_used_as_they_are(tmp_path, mode):
    written = {
        part: write_images(tmp_path / folder, mode=mode, seed=i)
        for i, (part, folder) in enumerate((("train", "train"), ("validation", "val"), ("test", "test")))
    }
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    splits = data.load(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert splits.input_shape == (3 if mode == "RGB" else 1, 6, 8)
    for part, images in written.items():
        assert named(getattr(splits, part)) == images


@pytest.mark.parametrize("folder", ["test", "val", "validation"])
def test_a_single_held_out_folder_is_the_test_set(tmp_path, folder):
    train, test = write_images(tmp_path / "train", count=10), write_images(tmp_path / folder, seed=1)
    splits = data.load(tmp_path, validation=4)
    assert named(splits.test) == test
    assert {**named(splits.train), **named(splits.validation)} == train
    assert len(splits.validation) == 4


def test_class_folders_alone_are_cut_by_seed(tmp_path):
    written = write_images(tmp_path, count=20)
    splits = data.load_folder(tmp_path, validation=6, test=0.25, seed=1)
    parts = [named(part) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [24, 6, 10]
    assert parts[0] | parts[1] | parts[2] == written
    other = data.load_folder(tmp_path, validation=6, test=0.25, seed=2)
    assert named(other.test) != parts[2]


def test_sizes_must_agree_or_be_given(tmp_path):
    write_images(tmp_path / "train", count=10)
    write_images(tmp_path / "test", size=(9, 6))
    with pytest.raises(DataError, match=r"0\.png: expected 6x8 pixels .* found 6x9; give size="):
        data.load(tmp_path)
    assert data.load(tmp_path, size=(5, 7)).input_shape == (3, 5, 7)
    with pytest.raises(DataError, match="both positive"):
        data.load(tmp_path, size=(0, 7))


def test_one_colour_image_makes_all_images_colour(tmp_path):
    write_images(tmp_path, mode="L", count=6)
    PIL.Image.fromarray(np.full((6, 8, 3), (10, 20, 30), np.uint8)).save(tmp_path / "dog" / "x.png")
    splits = data.load(tmp_path)
    assert splits.input_shape == (3, 6, 8)
    colours = [
        tuple(image[:, 0, 0]) for part in (splits.train, splits.validation, splits.test) for image in part.images
    ]
    assert (10, 20, 30) in colours
    assert sum(r == g == b for r, g, b in colours) == 12


def test_damaged_images_and_classes_are_named(tmp_path):
    write_images(tmp_path / "train", count=10)
    write_images(tmp_path / "test")
    path = tmp_path / "train" / "dog" / "3.png"
    whole = path.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"3\.png: expected a readable image"):
            data.load(tmp_path, dataset="folder")
    path.write_bytes(whole)
    write_images(tmp_path / "test", classes=("cow",))
    with pytest.raises(DataError, match=r"cow: expected one of the classes in train \(cat, dog\), found cow"):
        data.load(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(DataError, match="expected images of class cow, found none"):
        data.load(tmp_path)


# one door


def test_several_sets_in_one_folder_must_be_named(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    write_cifar(tmp_path, "cifar-10-batches-bin")
    with pytest.raises(DataError, match=r"found mnist .*MNIST/raw.*, cifar10 .*dataset="):
        data.load(tmp_path)
    assert data.load(tmp_path, dataset="mnist").input_shape == (1, 28, 28)
    assert data.load(tmp_path, dataset="cifar10").input_shape == (3, 32, 32)
    with pytest.raises(DataError, match="expected cifar100"):
        data.load(tmp_path, dataset="cifar100")
    with pytest.raises(DataError, match="expected folders train/CLASS or CLASS with images"):
        data.load(tmp_path, dataset="folder")
    with pytest.raises(ValueError, match="unknown dataset 'imagenet'; known are mnist"):
        data.load(tmp_path, dataset="imagenet")
    with pytest.raises(ValueError, match="size is for a folder"):
        data.load(tmp_path, dataset="mnist", size=(8, 8))


def test_a_folder_without_a_set_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match="expected the files of MNIST"):
        data.load(tmp_path)
    with pytest.raises(DataError, match="expected a folder with a data set, found nothing"):
        data.load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="found a file"):
        data.load(tmp_path / "file")


def test_digits_are_real_and_cut_in_three():
    splits = data.load("digits")
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 1797
    assert splits.input_shape == (1, 8, 8)
    assert splits.train.images.min() == 0
    assert splits.train.images.max() == 1
    assert np.bincount(splits.test.labels).min() >= 40


def test_reading_needs_no_torch(tmp_path):
    write_mnist(tmp_path)
    program = textwrap.dedent(
        """
        import sys
        sys.modules["torch"] = None  # any import of it fails
        from autocompress_fast import data
        splits = data.load(sys.argv[1])
        print(splits.test.normalized(slice(0, 3)).shape)
        """
    )
    run = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(run, check=True, cwd=tmp_path, capture_output=True, text=True).stdout == "(3, 1, 28, 28)\n"
