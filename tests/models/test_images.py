"""Images from every layout, their decoding in worker processes, draws, hashes, and classes in the model's numbers."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from greenlet import greenlet
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig

from obsprune.errors import InputError
from obsprune.models import pixels
from obsprune.models.images import ImageSamples, ImageSource, Labels, load_processor, open_images
from obsprune.models.pixels import Damage, Unreadable, decode, each, output_size, preprocessing, settings

CPU = torch.device("cpu")
CLASSES = ["tench, Tinca tinca", "great white shark, man-eater", "crane", "crane", "maillot", "maillot, tank suit"]
WNIDS = ["n01440764", "n01484850", "n02012849", "n03126707", "n03710637", "n03710721"]
PREPROCESSING = {
    "image_processor_type": "MobileNetV1ImageProcessor",
    "size": {"shortest_edge": 10},
    "crop_size": {"height": 8, "width": 8},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


def labels_of(*names: str) -> Labels:
    return Labels(PretrainedConfig(id2label=dict(enumerate(names))))


def write_processor(directory: Path, **changes: Any) -> Any:
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSING, **changes}))
    return load_processor(directory)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_processor(tmp_path_factory.mktemp("processor"))


def picture(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    """Noise, no two alike."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(folder: Path, count: int) -> Path:
    folder.mkdir()
    for seed in range(count):
        picture(seed).save(folder / f"{seed:03}.png")
    return folder


def damage(path: Path) -> None:
    """Cuts a file in half, so that its header is still good."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with Image.open(path) as image:
        assert image.size == (20, 14)


def opened(source: Path | str, processor: Any, labels: Labels | None = None, split: str = "train") -> ImageSource:
    return open_images(str(source), processor, labels or labels_of(*CLASSES), split)


def pixels_of(samples: ImageSamples, size: int = 4) -> torch.Tensor:
    return torch.cat([batch["pixel_values"] for batch in samples.batches(size, CPU)])


def plainly(processor: Any, images: list[Image.Image]) -> torch.Tensor:
    """What transformers makes of the images, all in one call."""
    made: torch.Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return made


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Worker processes even for a few images, and two of them on any machine."""
    monkeypatch.setattr(pixels, "_workers", lambda count: 2)
    yield


# ------------------------------------------------------------------------------------------------ decoding

GREY = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
MODES: dict[str, Callable[[], tuple[bytes, np.ndarray]]] = {
    "grey": lambda: (encoded(Image.fromarray(GREY)), np.stack([GREY] * 3, -1)),
    "16 bit grey": lambda: (encoded(Image.fromarray(GREY.astype(np.uint16) * 256 + 7)), np.stack([GREY] * 3, -1)),
    "black and white": lambda: (
        encoded(Image.fromarray(GREY > 100)),
        np.stack([np.where(GREY > 100, 255, 0)] * 3, -1),
    ),
    "palette": lambda: (
        encoded(picture(1).quantize(200)),
        np.asarray(picture(1).quantize(200).convert("RGB")),
    ),
    "palette with transparency": lambda: (
        encoded(picture(1).quantize(200), transparency=bytes(range(200))),
        np.asarray(picture(1).quantize(200).convert("RGB")),
    ),
    "transparent": lambda: (
        encoded(Image.merge("RGBA", [*picture(2).split(), Image.new("L", (20, 14), 9)])),
        np.asarray(picture(2)),
    ),
    "cmyk": lambda: (
        encoded(Image.merge("CMYK", [*picture(3).split(), Image.new("L", (20, 14), 0)]), "tiff"),
        255 - np.asarray(picture(3)),
    ),
    "turned by exif": lambda: (encoded(picture(4), exif=_turned()), np.asarray(picture(4))),
    "first frame": lambda: (
        encoded(picture(5), "tiff", save_all=True, append_images=[picture(6)]),
        np.asarray(picture(5)),
    ),
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    content, expected = MODES[mode]()
    image = decode(content)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)


BROKEN: dict[str, tuple[bytes, str]] = {
    "truncated jpeg": (encoded(picture(0, 64, 64), "jpeg")[:-300], "truncated"),
    "truncated png": (encoded(picture(0, 64, 64))[:-300], "truncated"),
    "damaged png": (encoded(picture(0)).replace(b"IDAT", b"XXXX"), "."),
    "text": (b"once upon a time", "no image of a known format"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_image_is_refused(kind: str) -> None:
    content, reason = BROKEN[kind]
    with pytest.raises(Unreadable, match=reason) as first:
        decode(content)
    with pytest.raises(Unreadable) as second:
        decode(content)
    assert str(first.value) == str(second.value)  # no address in memory, which no two reports would share


def test_large_images_are_read_without_a_word_and_bombs_are_damage(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert decode(encoded(picture(0))).size == (20, 14)
    assert not recwarn.list
    with pytest.raises(Unreadable, match="bomb"):
        decode(encoded(picture(0, 40, 40)))


# ------------------------------------------------------------------------------------------------ the processor


def test_pixels_are_the_processors_own(tmp_path: Path, processor: Any) -> None:
    source = opened(flat(tmp_path / "a", 9), processor)
    batches = source.every().batches(4, CPU)
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(4, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8)]
    assert all(set(batch) == {"pixel_values"} and batch["pixel_values"].dtype == torch.float32 for batch in batches)
    assert torch.equal(pixels_of(source.every()), plainly(processor, [picture(seed) for seed in range(9)]))


def test_an_image_of_three_rows_is_not_taken_for_channels(processor: Any) -> None:
    lines = Image.fromarray(np.repeat(np.arange(0, 240, 12, dtype=np.uint8), 9).reshape(20, 3, 3)).transpose(
        Image.Transpose.ROTATE_90
    )
    assert lines.size == (20, 3)
    made = pixels.pixels(processor, lines)
    assert made.shape == (3, 8, 8)
    assert np.ptp(made[0], axis=0).max() < 0.01 < np.ptp(made[0], axis=1).min()  # stripes that stand, as in the image


def test_a_processor_that_keeps_the_aspect_is_refused(tmp_path: Path) -> None:
    loose = write_processor(tmp_path / "p", do_center_crop=False)
    with pytest.raises(InputError, match=r"10×12 or 12×10.*crop_size or size"):
        opened(flat(tmp_path / "a", 1), loose)
    wide = write_processor(tmp_path / "q", crop_size={"height": 6, "width": 8})
    assert output_size(wide) == (6, 8)


def test_a_directory_without_a_processor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path} has no usable image processor")):
        load_processor(tmp_path)


@pytest.mark.parametrize("model", ["deit-tiny", "mobilenet-v1-050-160"])
def test_processors_of_real_models_load_without_a_word(
    assets: Path, model: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    processor = load_processor(assets / model)
    assert output_size(processor) == ((224, 224) if model == "deit-tiny" else (160, 160))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_what_a_report_says_of_the_preprocessing(tmp_path: Path, processor: Any) -> None:
    assert preprocessing(processor) == {
        "resize": {"shortest_edge": 10},
        "crop": {"height": 8, "width": 8},
        "crop_pct": 0.8,
        "interpolation": "bilinear",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.6, 0.7],
    }
    json.dumps(settings(processor))
    square = write_processor(tmp_path / "a", size={"height": 8, "width": 8}, do_center_crop=False, do_normalize=False)
    told = preprocessing(square)
    assert (told["crop"], told["crop_pct"], told["mean"], told["std"]) == (None, 1.0, None, None)
    for edge, share in ((224, 0.875), (384, 1.0)):  # ConvNeXt crops small images only
        kept = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": edge}, "crop_pct": 0.875}
        (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(kept))
        convnext = load_processor(tmp_path / "a")
        assert preprocessing(convnext)["crop_pct"] == share
        edges = pixels.pixels(convnext, _marked(edge))
        assert bool(edges[0, edge // 2, 0] > edges[0, edge // 2, edge // 2]) == (share == 1.0)


def _marked(edge: int) -> Image.Image:
    """Black with a white frame, which a crop takes away."""
    image = Image.new("RGB", (edge, edge), "white")
    margin = edge // 50
    image.paste("black", (margin, margin, edge - margin, edge - margin))
    return image


# ------------------------------------------------------------------------------------------------ worker processes


def test_workers_change_neither_order_nor_pixels(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = opened(flat(tmp_path / "a", 41), processor).every()
    samples = every.take(torch.randperm(41, generator=torch.Generator().manual_seed(1)).tolist())
    found = []
    for count in (0, 1, 2):
        monkeypatch.setattr(pixels, "_workers", lambda _, count=count: count)
        pids = [pid for chunk in each(samples.layout.pictures, samples.places, _pid, 5) for pid in chunk]
        assert len(set(pids)) == max(count, 1) and (os.getpid() in pids) == (count == 0)
        found.append((pixels_of(samples, 7), samples.content_hash()))
    assert torch.equal(found[0][0], plainly(processor, [picture(place) for place in samples.places]))
    assert all(torch.equal(found[0][0], values) and found[0][1] == told for values, told in found[1:])


def _pid(_: bytes) -> int:
    return os.getpid()


def test_few_images_need_no_worker() -> None:
    assert pixels._workers(pixels.FEW) == 0 < pixels._workers(pixels.FEW + 1) <= pixels.MOST_WORKERS


@pytest.mark.usefixtures("workers")
def test_workers_leave_the_global_generator_and_sleeping_greenlets_alone(tmp_path: Path, processor: Any) -> None:
    samples = opened(flat(tmp_path / "a", 6), processor).every()
    home = greenlet.getcurrent()
    sleeper = greenlet(lambda: home.switch("asleep") + 1)
    assert sleeper.switch() == "asleep"
    before = torch.get_rng_state()
    inside = greenlet(lambda: pixels_of(samples, 2)).switch()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, plainly(processor, [picture(seed) for seed in range(6)]))
    assert sleeper.switch(1) == 2


@pytest.mark.usefixtures("workers")
def test_a_stream_leaves_damaged_images_out_and_names_them(tmp_path: Path, processor: Any) -> None:
    folder = flat(tmp_path / "a", 10)
    samples = opened(folder, processor).every()
    for name in ("000", "001", "005"):
        damage(folder / f"{name}.png")
    (folder / "007.png").unlink()
    stream = samples.stream(2)
    assert len(stream) == 5
    for _ in range(2):  # a second pass starts afresh
        parts = list(stream)
        assert [indices for indices, _ in parts] == [[2, 3], [4], [6], [8, 9]]
        good = [index for indices, _ in parts for index in indices]
        values = torch.cat([values for _, values in parts])
        assert torch.equal(values, plainly(processor, [picture(seed) for seed in good]))
        assert [damage.name for damage in stream.damaged] == ["000.png", "001.png", "005.png", "007.png"]
        assert "truncated" in stream.damaged[0].reason and "No such file" in stream.damaged[3].reason
    with pytest.raises(InputError, match=r"4 of 10 images of .* cannot be read: 000.png \(.*truncated"):
        samples.batches(3, CPU)


# ------------------------------------------------------------------------------------------------ draws


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", [0, 2])
def test_a_draw_is_the_permutation_without_the_damaged(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(pixels, "_workers", lambda _: count)
    folder = flat(tmp_path / "a", 40)
    order = torch.randperm(40, generator=generator(3)).tolist()
    for place in (order[0], order[4], order[9], order[30]):
        damage(folder / f"{place:03}.png")
    source = opened(folder, processor)
    assert source.notices() == []
    assert list(source.sample(6, generator(3)).places) == [*order[1:4], *order[5:8]]
    [notice] = source.notices()
    assert notice.startswith(f"2 of 8 images of {folder} cannot be read and are left out: ")
    assert all(f"{place:03}.png (" in notice for place in (order[0], order[4]))
    assert f"{order[9]:03}.png" not in notice  # it was looked at ahead, by a worker, but not drawn
    more = source.sample(6, generator(3), more=5)
    assert list(more.places) == [*order[1:4], *order[5:9], *order[10:14]]
    assert source.notices()[0].startswith(f"3 of 14 images of {folder}")
    assert len(source.sample(50, generator(3), more=9)) == 36
    assert source.notices()[0].startswith(f"4 of 40 images of {folder}")
    other = source.sample(6, generator(4))
    assert list(other.places) != list(more.places)[:6]


def test_a_draw_from_chosen_samples_and_none_at_all(tmp_path: Path, processor: Any) -> None:
    every = opened(flat(tmp_path / "a", 12), processor).every()
    damage(tmp_path / "a" / "007.png")
    source = ImageSource("kept apart", every.take([9, 7, 3]))
    assert sorted(source.sample(5, generator()).places) == [3, 9]
    assert source.notices()[0].startswith("1 of 3 images of kept apart cannot be read and are left out: 007.png (")
    none = every.take([])
    assert none.batches(4, CPU) == [] and len(none.content_hash()) == 64 and none.facts()["images"] == 0


def test_a_draw_leaves_the_generator_where_more_would(tmp_path: Path, processor: Any) -> None:
    source = opened(flat(tmp_path / "a", 12), processor)
    few, many = generator(), generator()
    source.sample(2, few), source.sample(2, many, more=8)
    assert torch.equal(few.get_state(), many.get_state())


def test_many_damaged_images_are_told_by_some_names(tmp_path: Path, processor: Any) -> None:
    folder = flat(tmp_path / "a", 9)
    for path in sorted(folder.iterdir())[:-1]:
        damage(path)
    source = opened(folder, processor)
    assert len(source.sample(3, generator())) == 1
    [notice] = source.notices()
    assert notice.startswith("8 of 9 images") and notice.endswith(", and 3 more") and notice.count(".png (") == 5


def test_a_source_without_one_good_image(tmp_path: Path, processor: Any) -> None:
    folder = flat(tmp_path / "a", 2)
    for path in folder.iterdir():
        damage(path)
    source = opened(folder, processor)
    with pytest.raises(InputError, match=r"none of 2 images of .* can be read: 00\d.png \(.*truncated"):
        source.sample(1, generator())


def test_samples_tell_and_take(tmp_path: Path, processor: Any) -> None:
    folder = flat(tmp_path / "a", 5)
    every = opened(folder, processor).every()
    assert every.facts() == {"dataset": str(folder), "images": 5, "size": [8, 8]}
    assert (every.positions, every.together, every.unit, every.noun) == (1, 32, "images", "images")
    part = every.take([4, 0, 2]).take([2, 0])
    assert torch.equal(pixels_of(part), plainly(processor, [picture(2), picture(4)]))


# ------------------------------------------------------------------------------------------------ hashes


def test_a_hash_is_of_bytes_order_and_preprocessing(tmp_path: Path, processor: Any) -> None:
    folder, twin = flat(tmp_path / "a", 4), flat(tmp_path / "b", 4)
    every = opened(folder, processor).every()
    known = every.content_hash()
    assert re.fullmatch("[0-9a-f]{64}", known)
    for path in sorted(twin.iterdir()):
        path.rename(twin / f"x{path.name}")
    assert opened(twin, processor).every().content_hash() == known
    again = write_processor(tmp_path / "p", transformers_version="4.0")
    assert opened(folder, again).every().content_hash() == known
    changed = [
        every.take([0, 1, 2]),
        every.take([1, 0, 2, 3]),
        opened(folder, write_processor(tmp_path / "q", resample=3)).every(),
        opened(folder, write_processor(tmp_path / "r", image_mean=[0.5, 0.5, 0.5])).every(),
    ]
    hashes = {samples.content_hash() for samples in changed}
    picture(99).save(folder / "003.png")
    hashes.add(every.content_hash())
    assert len(hashes | {known}) == 6


# ------------------------------------------------------------------------------------------------ layouts

KNOWN = [0, 1, 4, 5, 4, 1]
"""Class of each picture, by its seed."""
FOLDERS = {0: "tinca tinca", 1: "Great_White_Shark", 4: "maillot", 5: "tank suit"}
"""Folders sort otherwise than their classes."""


def tree(folder: Path, name: Callable[[int], str]) -> Path:
    for seed, index in enumerate(KNOWN):
        (folder / name(index) / "deep").mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / name(index) / ("deep" if seed % 2 else "") / f"{seed:03}.PNG")
    return folder


def labels_file(folder: Path, name: str, header: str, line: str) -> Path:
    flat(folder, len(KNOWN))
    (folder / ".hidden.png").write_text("")
    lines = [line.format(path=f"{seed:03}.png", number=index, wnid=WNIDS[index]) for seed, index in enumerate(KNOWN)]
    (folder / name).write_text("\n".join([*([header] if header else []), *lines, "", ""]))
    return folder / name


def table(**features: Any) -> datasets.Dataset:
    content = [{"path": f"{seed}.png", "bytes": encoded(picture(seed))} for seed in range(len(KNOWN))]
    columns = {"id": list(range(len(KNOWN))), "image": content, "label": KNOWN}
    kinds = {"id": datasets.Value("int32"), "image": datasets.Image(), "label": datasets.Value("int64"), **features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def saved(tables: Any, path: Path) -> Path:
    tables.save_to_disk(path)
    return path


NAMES = ["tench, Tinca tinca", "great white shark, man-eater", "crane bird", "crane machine", "maillot", "tank suit"]
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "tree by name": lambda path: tree(path / "t", FOLDERS.__getitem__),
    "tree by number": lambda path: tree(path / "t", str),
    "tree in splits": lambda path: (tree(path / "t" / "train", str), flat(path / "t" / "val", 3))[0].parent,
    "tsv": lambda path: labels_file(path / "a", "x.tsv", "", "{path}\t{number}\t{wnid}\ta, b"),
    "tsv with header": lambda path: labels_file(path / "a", "x.tsv", "id\tfile\tclass", "7\t{path}\t{number}"),
    "csv turned round": lambda path: labels_file(path / "a", "x.csv", "Label,File_Name", '"{number}","{path}"'),
    "csv of a spreadsheet": lambda path: labels_file(path / "a", "x.csv", "\ufeffpath,class", "{path}, {number}\r"),
    "txt": lambda path: labels_file(path / "a", "x.txt", "", "{path}   {number} more words"),
    "saved, numbers": lambda path: saved(table(), path / "d"),
    "saved, names": lambda path: saved(table(label=datasets.ClassLabel(names=NAMES)), path / "d"),
    "saved, splits": lambda path: saved(datasets.DatasetDict(train=table(), test=table().select(range(2))), path / "d"),
}


@pytest.fixture(scope="module")
def truth(processor: Any) -> torch.Tensor:
    return plainly(processor, [picture(seed) for seed in range(len(KNOWN))])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_and_classes(
    tmp_path: Path, processor: Any, truth: torch.Tensor, layout: str
) -> None:
    path = LAYOUTS[layout](tmp_path)
    every = opened(path, processor).every()
    seeds = range(len(KNOWN)) if "tree" not in layout else _in_order(every)
    assert torch.equal(pixels_of(every), truth[list(seeds)])
    assert every.classes == [KNOWN[seed] for seed in seeds]
    reference = opened(flat(tmp_path / "flat", len(KNOWN)), processor).every()
    assert every.content_hash() == reference.take(list(seeds)).content_hash()
    assert every.layout.rule in ("class numbers", "class names", "the order of the data set's classes")
    assert every.facts().get("split") == ("train" if "splits" in layout else None)


def _in_order(samples: ImageSamples) -> list[int]:
    """The seeds of a tree's pictures, which are sorted by their paths."""
    names = [samples.layout.pictures.name(place) for place in samples.places]
    assert names == sorted(names) and len(set(names)) == len(KNOWN)
    return [int(Path(name).stem) for name in names]


def test_a_flat_folder_has_no_classes(tmp_path: Path, processor: Any) -> None:
    every = opened(flat(tmp_path / "a", 2), processor).every()
    assert every.classes == [None, None] and "flat folder" in every.layout.rule


def test_a_tree_of_unknown_classes_can_be_calibrated_on(tmp_path: Path, processor: Any) -> None:
    source = opened(tree(tmp_path / "t", "kind {}".format), processor)
    assert source.sample(6, generator()).classes == [None] * 6
    assert re.search(r"class 'kind \d' is none of the model's 6 classes.*labels file", source.every().layout.rule)


def test_splits_of_folders_and_of_saved_tables(tmp_path: Path, processor: Any) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for name, count in (("train", 3), ("val", 2)):
        flat(folder / name, count)
    tables = datasets.DatasetDict(train=table(), validation=table().select([1]), test=table().select([2, 3]))
    stored = saved(tables, tmp_path / "d")
    lone = saved(datasets.DatasetDict(only=table()), tmp_path / "e")
    found = {
        (source.name, split): (len(samples := opened(source, processor, split=split).every()), samples.layout.split)
        for source in (folder, stored, lone)
        for split in ("train", "validation", "test")
    }
    assert found == {
        ("f", "train"): (3, "train"),
        ("f", "validation"): (2, "val"),
        ("f", "test"): (2, "val"),
        ("d", "train"): (6, "train"),
        ("d", "validation"): (1, "validation"),
        ("d", "test"): (2, "test"),
        ("e", "train"): (6, "only"),
        ("e", "validation"): (6, "only"),
        ("e", "test"): (6, "only"),
    }
    with pytest.raises(InputError, match="no split 'extra', it has train, validation, test"):
        opened(stored, processor, split="extra")


def test_a_data_set_of_the_hub(processor: Any, truth: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    tables = {"train": table().select([5]), "validation": table(label=datasets.ClassLabel(names=NAMES))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or tables)
    every = opened("someone/pictures", processor, split="validation").every()
    assert asked == ["someone/pictures"]
    assert torch.equal(pixels_of(every), truth) and every.classes == KNOWN


def test_columns_of_tables(tmp_path: Path, processor: Any) -> None:
    def rule(tables: Any) -> tuple[list[int | None], str]:
        path = tmp_path / f"d{len(list(tmp_path.iterdir()))}"
        samples = opened(saved(tables, path), processor).every()
        return samples.classes, samples.layout.rule

    named = datasets.ClassLabel(names=NAMES)
    assert rule(table(label=named).rename_column("label", "species").rename_column("image", "img"))[0] == KNOWN
    classes, why = rule(table().remove_columns("label"))
    assert classes == [None] * 6 and "no column of classes" in why
    several = table(label=named).rename_column("label", "fine").add_column("coarse", KNOWN).cast_column("coarse", named)
    assert rule(several)[0] == [None] * 6
    hidden = table().map(lambda row: {"label": -1 if row["id"] > 3 else row["label"]}).cast_column("label", named)
    classes, why = rule(hidden)
    assert classes == [None] * 6 and "tells 4 of 6 classes" in why
    with pytest.raises(InputError, match=r"no column of images.*id, label"):
        rule(table().remove_columns("image"))
    pair = table().rename_column("image", "left")
    pair = datasets.concatenate_datasets(
        [pair, table().select_columns("image").rename_column("image", "right")], axis=1
    )
    with pytest.raises(InputError, match=r"several and none is called image; its columns are id, left, label, right"):
        rule(pair)
    assert rule(pair.rename_column("right", "image"))[0] == KNOWN


@pytest.mark.usefixtures("workers")
def test_cells_without_an_image_are_damage(tmp_path: Path) -> None:
    flat(tmp_path / "a", 2)
    cells = [
        {"path": None, "bytes": encoded(picture(0))},
        None,
        {"path": str(tmp_path / "a" / "001.png"), "bytes": None},
        {"path": str(tmp_path / "gone.png"), "bytes": None},
    ]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": cells}, features=features)
    pictures = pixels.Cells(rows.cast_column("image", datasets.Image(decode=False)), "image")
    found = [made for chunk in each(pictures, range(4), len, 3) for made in chunk]
    assert found[0] == len(encoded(picture(0))) and found[2] == (tmp_path / "a" / "001.png").stat().st_size
    assert found[1] == Damage("row 1", "no image")
    assert found[3] == Damage("row 3", "No such file or directory")


# ------------------------------------------------------------------------------------------------ classes


def test_numbers_and_names() -> None:
    labels = labels_of(*CLASSES)
    assert (labels.offset, labels.count) == (0, 6)
    assert [labels.index(value) for value in (0, "3", " 5 ", "05")] == [0, 3, 5, 5]
    assert labels.index("tench, Tinca tinca") == labels.index("TENCH") == labels.index("tinca_tinca") == 0
    assert labels.index("man-eater") == 1
    assert labels.index("maillot") == 4  # a whole label comes before a synonym
    assert labels.index("tank suit") == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("6", "class 6 is none of the model's 6 classes, whose numbers are 0 to 5$"),
        (-1, "class -1 is none of the model's 6"),
        ("crane", r"'crane' is ambiguous, it may be 2 \(crane\) or 3 \(crane\); give the number"),
        ("Maillot", r"ambiguous, it may be 4 \(maillot\) or 5 \(maillot, tank suit\)"),
        ("tensh", r"did you mean tench\?.*number \(0 to 5\) or its label"),
        ("", "class '' is none"),
        ("n01440764", "WordNet number, and the model names its 6 classes otherwise; give a labels file"),
    ],
)
def test_unknown_classes(value: str | int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        labels_of(*CLASSES).index(value)


def test_background_shifts_numbers_and_nothing_else() -> None:
    labels = labels_of("background", *CLASSES)
    assert (labels.offset, labels.count) == (1, 6)
    assert [labels.index(number) for number in range(6)] == [1, 2, 3, 4, 5, 6]
    assert labels.index("tench") == 1 and labels.index("background") == 0
    with pytest.raises(InputError, match=r"class 6 is none of .* 6 classes.* 0 to 5, not counting its class 0, backgr"):
        labels.index(6)
    with pytest.raises(InputError, match=r"2 \(crane\) or 3 \(crane\)"):
        labels.index("crane")
    assert labels.resolve(WNIDS[::-1]).indices == {wnid: place + 1 for place, wnid in enumerate(WNIDS)}
    assert labels.resolve_ordered(NAMES).indices["crane machine"] == 4


def test_wordnet_numbers() -> None:
    assert labels_of(*CLASSES).resolve(reversed(WNIDS)).indices == {wnid: place for place, wnid in enumerate(WNIDS)}
    with pytest.raises(InputError, match=r"WordNet number.* all 6 classes"):
        labels_of(*CLASSES).resolve(WNIDS[:5])
    turned = labels_of(*WNIDS[::-1])  # a model that names its classes so is asked, whatever their order
    assert turned.resolve(WNIDS).indices == {wnid: 5 - place for place, wnid in enumerate(WNIDS)}
    assert turned.resolve(WNIDS[2:3]).indices == {WNIDS[2]: 3}
    with pytest.raises(InputError, match="n00000001"):
        turned.resolve(["n00000001", *WNIDS[1:]])
    both = labels_of(*(f"{wnid} {name}" for wnid, name in zip(WNIDS[::-1], "abcdef", strict=True)))
    assert both.resolve(WNIDS).indices == turned.resolve(WNIDS).indices


def test_names_that_a_data_set_numbers_itself() -> None:
    labels = labels_of(*CLASSES)
    assert labels.resolve_ordered(["shark", *NAMES[1:]]).indices["shark"] == 0
    with pytest.raises(InputError, match="crane bird"):
        labels.resolve_ordered([NAMES[1], NAMES[0], *NAMES[2:]])  # two known names stand elsewhere
    with pytest.raises(InputError, match="crane bird"):
        labels.resolve_ordered(NAMES[:5])
    assert labels.resolve_ordered(["5", "4"]).indices == {"5": 5, "4": 4}


@pytest.mark.parametrize("model", ["deit-tiny", "mobilenet-v1-050-160"])
def test_the_sample_of_imagenet_has_one_image_of_each_class(assets: Path, model: str, tmp_path: Path) -> None:
    config, processor = AutoConfig.from_pretrained(assets / model), load_processor(assets / model)
    labels, sample = Labels(config), assets / "imagenet-sample"
    every = open_images(str(sample / "labels.tsv"), processor, labels).every()
    offset = 1 if model.startswith("mobilenet") else 0
    assert labels.offset == offset and every.classes == list(range(offset, 1000 + offset))
    rows = [line.split("\t") for line in (sample / "labels.tsv").read_text().splitlines()]
    assert [every.layout.pictures.name(place) for place in range(1000)] == [row[0] for row in rows]
    wnids = labels.resolve(row[2] for row in rows)
    assert [wnids.indices[row[2]] for row in rows] == every.classes
    named = {index: row[3] for index, row in zip(every.classes, rows, strict=True)}
    assert all(config.id2label[index] == name for index, name in named.items())
    assert sum(labels._known(name) == index for index, name in named.items()) == 998  # all but the two cranes
    part = every.take(range(0, 1000, 125))
    images = [Image.open(sample / rows[place][0]).convert("RGB") for place in part.places]
    plain = AutoImageProcessor.from_pretrained(assets / model, backend="pil")
    assert torch.equal(pixels_of(part), plain(images=images, return_tensors="pt")["pixel_values"])


# ------------------------------------------------------------------------------------------------ bad input


def written(path: Path, name: str, text: str | bytes) -> Path:
    flat(path / "a", 3)
    (path / "a" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path / "a" / name


def beside(path: Path) -> Path:
    flat(flat(path / "a", 3) / "b", 2)
    return path / "a"


def hollow(path: Path, name: str) -> Path:
    (path / "a" / ".hidden").mkdir(parents=True)
    (path / "a" / ".hidden" / "x.png").write_bytes(encoded(picture(0)))
    (path / "a" / name).write_text("x")
    return path / "a"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty folder": (lambda path: path, "holds no images (.jpg .jpeg"),
    "no images": (lambda path: hollow(path, "notes.md"), "holds no images (.jpg .jpeg"),
    "images beside folders": (beside, "holds 3 images beside folders that hold 2; give one of the folders"),
    "damaged saved table": (lambda path: hollow(path, "state.json"), "cannot be read as a saved data set"),
    "nothing there": (lambda path: path / "gone", "there is no file or folder"),
    "no labels file there": (lambda path: Path("gone.csv"), "there is no file or folder gone.csv"),
    "an image": (lambda path: flat(path / "a", 1) / "000.png", "is one image; give a folder of images, or a labels"),
    "another file": (lambda path: written(path, "a.md", "x"), "neither a folder of images nor a labels file (.tsv"),
    "empty labels file": (lambda path: written(path, "a.tsv", "\n \n"), "is empty; a labels file has a path and"),
    "labels file with nothing below": (lambda path: written(path, "a.tsv", "path\tclass\n"), "it holds no images"),
    "binary labels file": (lambda path: written(path, "a.tsv", b"\xff\xfe\x00"), "cannot be read as a labels file"),
    "story": (
        lambda path: written(path, "a.txt", "Once upon a time\nthere was"),
        "a.txt line 1 names the image Once, which is not there (2 of 2 are missing); a labels file has a path, from",
    ),
    "long line": (lambda path: written(path, "a.csv", f"{'very ' * 100},1"), "line 1 names the image very"),
    "one column": (
        lambda path: written(path, "a.csv", "000.png,1\n\n001.png"),
        "a.csv line 3 has 1 column; a labels file has a path and a class on each line",
    ),
    "wrong separator": (lambda path: written(path, "a.tsv", "000.png,1"), "line 1 has 1 column; a labels file has"),
    "header without class": (
        lambda path: written(path, "a.csv", "file,kind\n000.png,1"),
        "has the columns file, kind; call the one with the class class",
    ),
    "missing image": (
        lambda path: written(path, "a.tsv", "000.png\t1\n0x0.png\t1\n001.png\t2\n"),
        "a.tsv line 2 names the image 0x0.png, which is not there (1 of 3 are missing)",
    ),
    "class beyond": (
        lambda path: written(path, "a.tsv", "path\tclass\n000.png\t5\n\n001.png\t6\n002.png\t7\n"),
        "a.tsv line 4: class 6 is none of the model's 6 classes, whose numbers are 0 to 5",
    ),
    "class below": (
        lambda path: written(path, "a.txt", "000.png -1"),
        "a.txt line 1: class -1 is none of the model's 6",
    ),
    "unknown name": (
        lambda path: written(path, "a.csv", "000.png,tench\n001.png,trench\n"),
        "a.csv line 2: class 'trench' is none of the model's 6 classes (did you mean tench?)",
    ),
    "wordnet numbers": (
        lambda path: written(path, "a.csv", "000.png,n01440764"),
        "a.csv line 1: class 'n01440764' is a WordNet number",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_sentence(tmp_path: Path, processor: Any, kind: str) -> None:
    make, message = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        opened(path, processor)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_hub_cannot_give(processor: Any) -> None:
    with pytest.raises(InputError, match=r"'someone/nothing' is no local file.*; give a folder of images or a labels"):
        opened("someone/nothing", processor)


def test_a_folder_that_may_not_be_read(tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(folder: Path, onerror: Callable[[OSError], None], followlinks: bool) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", str(folder / "b")))
        yield from ()

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(InputError, match="b cannot be read: Permission denied"):
        opened(tmp_path, processor)
