"""Text features beside a data set: what is stored is what the encoders say of the captions of the
same images, and a batch has a caption of each of its images.
"""

import json
import pickle
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from launch import call, error_of
from test_captions import captions_of, coco, write_captioned
from toy_data import tree, write_images, write_text_encoder, write_vision_model

from sra_fast.config.schema import AlignConfig, Config, DataConfig, ModelConfig, TrainConfig
from sra_fast.data.dataset import make_dataset, open_data
from sra_fast.data.facts import DataFacts, differences
from sra_fast.data.feature_jobs import check_same_images
from sra_fast.data.folders import ImageFolder
from sra_fast.data.images import Crop
from sra_fast.data.latents import PackedLatents
from sra_fast.data.loader import Batches
from sra_fast.data.order import ImageNumbers, ShuffledBatches
from sra_fast.data.packed import file_entry
from sra_fast.data.pixels import PackedPixels
from sra_fast.data.preprocess import Options, make_jobs
from sra_fast.data.stored_text import StoredText
from sra_fast.data.text_encoders import load_text_encoders
from sra_fast.data.writer import run_jobs
from sra_fast.diffusion.draws import block_seed
from sra_fast.utils.files import write_json

pytestmark = [
    pytest.mark.usefixtures("rooms"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers"),
]


def preprocess(*args) -> str:
    done = call("preprocess", *args, "--threads", 1, "--batch", 4)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def packing(root, out, *args) -> str:
    """The toy images as pixels with the features of CLIP, mirrored, three of them held out."""
    return preprocess(
        *("--source", root / "images", "--out", out, "--pixels", "true", "--resolution", 16),
        *("--holdout", 0.25, "--mirror", "true", "--shard_size", 5),
        *("--captions", "txt", "--text-encoders", root / "clip", "--text_dtype", "float32"),
        *args,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    write_captioned(root / "images")
    write_text_encoder(root / "clip")
    write_text_encoder(root / "other", seed=3)
    write_text_encoder(root / "t5", "T5EncoderModel")
    said = packing(root, root / "data")
    assert "data/text/clip: 15 captions of 18 images, text 20 x 16, pooled 16" in said
    assert "data/held_out/text/clip: 6 captions of 3 images, text" in said
    assert "text features of CLIPTextModel: deviations" in said
    assert "files are no images" not in said
    return root


@pytest.fixture
def data(made, tmp_path):
    """A copy to change."""
    shutil.copytree(made / "data", tmp_path / "data")
    return tmp_path / "data"


def opened(path, name=None, verify=False):
    found = open_data(DataConfig(path=str(path)))
    found.open_text(name, verify)
    return found


def held_names(made):
    """Names of the training images, and of those that are held out."""
    parts = ImageFolder(made / "images", Crop(16)).hold_out(0.25)
    return [part.names for part in parts]


def test_they_are_the_encoders_own_output_of_the_captions(made):
    encoders = load_text_encoders([str(made / "clip")])
    train = opened(made / "data", verify=True)
    held_out = train.held_out_split()[1][0]
    assert train.conditioning == "text" and held_out.text.name == "clip"
    assert open_data(DataConfig(path=str(made / "data"))).conditioning == "labels"
    for part, names, copies in zip((train, held_out), held_names(made), (2, 1), strict=True):
        text = part.text
        assert len(part) == len(text) == copies * len(names)
        assert (text.tokens, text.width, text.pooled, text.masked) == (20, 16, 16, False)
        for image in range(len(part)):
            captions = captions_of(names[image // copies])
            assert text.count(image) == len(captions)
            assert [text.caption(image, k) for k in range(len(captions))] == captions
            expected = encoders.encode(encoders.tokenize(captions)[0])
            found = text.read_captions([(image, k) for k in range(len(captions))])
            assert torch.allclose(found.tokens, expected.tokens, atol=1e-5)
            assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)
        # a batch: pixels, then text instead of labels, the first caption of each image
        images, tensors, features = part.split(part.__getitems__([2, 0]))
        condition = part.condition(tensors)
        assert images.shape == (2, 3, 16, 16) and features is None
        assert torch.equal(condition.tokens, text.read_captions([(2, 0), (0, 0)]).tokens)
        assert torch.equal(condition.pooled, text.read_captions([(2, 0), (0, 0)]).pooled)
        assert condition.mask is None and condition.drop is None
    nothing = encoders.encode(encoders.tokenize([""])[0])
    assert torch.allclose(condition.empty.tokens, nothing.tokens, atol=1e-5)
    assert torch.allclose(condition.empty.pooled, nothing.pooled, atol=1e-5)
    dropped = condition.dropped(torch.tensor([True, False])).seen()
    assert torch.equal(dropped.tokens[0], condition.empty.tokens[0])
    index = json.loads((made / "data/text/clip/index.json").read_text())
    assert index["encoders"] == encoders.identity
    assert index["text_paths"] == encoders.paths
    assert index["data_sha256"] == train.fingerprint
    everything = torch.stack(
        [
            t
            for i in range(0, 18, 2)
            for k in range(train.text.count(i))
            for t in train.text.read_captions([(i, k)]).tokens
        ]
    ).double()
    assert index["channels"]["mean"] == pytest.approx(everything.mean((0, 1)).tolist(), abs=1e-6)


def test_the_data_are_the_same_with_and_without_text(made, tmp_path):
    preprocess(
        *("--source", made / "images", "--out", tmp_path / "plain", "--pixels", "true"),
        *("--resolution", 16, "--holdout", 0.25, "--mirror", "true", "--shard_size", 5),
    )
    kept = {name: held for name, held in tree(made / "data").items() if "text/" not in name}
    assert tree(tmp_path / "plain") == kept
    # and the text is the same if it is made later, from COCO's list
    names = [name.replace("/", "-") for part in held_names(made) for name in part]
    listed = coco([name.replace("-", "/") for name in names], folder="")
    (tmp_path / "list.json").write_text(json.dumps(listed))
    said = preprocess(
        *("--source", made / "images", "--out", tmp_path / "plain", "--shard_size", 5),
        *("--captions", tmp_path / "list.json", "--text_encoders", made / "clip"),
        *("--text_dtype", "float32"),
    )
    assert "captions of 18 images" in said and "warning" not in said
    assert tree(tmp_path / "plain") == tree(made / "data")


def test_t5_with_its_mask_in_bf16(made, data):
    said = preprocess(
        *("--source", made / "images", "--out", data, "--captions", "txt"),
        *("--text-encoders", made / "t5", "--text-tokens", 12, "--text_dtype", "bfloat16"),
        *("--text-name", "t"),
    )
    assert "captions are too long for the text encoder" in said
    text = opened(data, "t").text
    assert (text.tokens, text.width, text.pooled, text.masked) == (12, 24, 0, True)
    encoders = load_text_encoders([str(made / "t5")], 12)
    captions = [text.caption(image, 0) for image in (4, 17)]
    expected = encoders.encode(encoders.tokenize(captions)[0])
    found = text.read([4, 17])
    assert found.tokens.dtype == torch.bfloat16 and found.mask.dtype == torch.bool
    assert torch.equal(found.mask, expected.mask) and found.pooled is None
    assert torch.allclose(found.tokens.float(), expected.tokens, atol=2e-2, rtol=2e-2)
    assert text.empty.mask.sum() == 1
    data = opened(data, "t")
    _, tensors, _ = data.split(data.__getitems__([4, 17]))
    assert torch.equal(data.condition(tensors).mask, expected.mask)


def test_several_encoders_are_stored_as_they_are_joined(made, data):
    names = ("clip", "other", "t5")
    preprocess(
        *("--source", made / "images", "--out", data, "--captions", "txt"),
        *("--text-encoders", *(made / name for name in names)),
        *("--text_tokens", 8, "--text_dtype", "float32"),
    )
    text = opened(data, "clip+other+t5").text
    assert (text.tokens, text.width, text.pooled, text.masked) == (28, 32, 32, False)
    encoders = load_text_encoders([str(made / name) for name in names], 8)
    expected = encoders.encode(encoders.tokenize([text.caption(5, 0)])[0])
    assert torch.allclose(text.read([5]).tokens, expected.tokens, atol=1e-5)
    assert torch.allclose(text.read([5]).pooled, expected.pooled, atol=1e-5)


def options_for(made, out, **changes) -> Options:
    options = {
        "source": str(made / "images"),
        "out": str(out),
        "pixels": True,
        "resolution": 16,
        "holdout": 0.25,
        "mirror": True,
        "shard_size": 5,
        "batch": 4,
        "threads": 1,
        "captions": ["txt"],
        "text_encoders": [str(made / "clip")],
        "text_dtype": "float32",
        **changes,
    }
    return Options(**options)


def test_two_processes_make_what_one_makes(made, tmp_path, monkeypatch):
    finished = {}
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        jobs = make_jobs(options_for(made, tmp_path / "two"))
        finished[rank] = [bool(done) for _, done in run_jobs(jobs)]
    assert finished == {1: [False] * 4, 0: [True] * 4}
    assert tree(tmp_path / "two") == tree(made / "data")


def test_interrupted_they_resume_bit_for_bit(made, tmp_path):
    class Interrupted(Exception):
        pass

    out = tmp_path / "out"
    jobs = make_jobs(options_for(made, out))
    text = jobs[-1]
    encode = text.encode
    calls = []

    def interrupted(ids):
        calls.append(ids)
        if len(calls) == 5:
            raise Interrupted
        return encode(ids)

    text.encode = interrupted
    with pytest.raises(Interrupted):
        list(run_jobs(jobs))
    # the data are complete, and can be trained on; the text is not
    assert len(PackedPixels(out)) == 18
    for name in (None, "clip"):
        with pytest.raises(ValueError, match="preprocessing of .*text/clip is not finished"):
            opened(out, name)
    first = (out / "text/clip/shards/00000.npy").stat().st_ino
    list(run_jobs(make_jobs(options_for(made, out))))
    assert (out / "text/clip/shards/00000.npy").stat().st_ino == first
    assert tree(out) == tree(made / "data")
    # with another encoder it does not resume
    changed = options_for(made, out, text_encoders=[str(made / "other")], text_name="clip")
    with pytest.raises(
        ValueError, match="text/clip was begun with encoders .*choose another text_name"
    ):
        list(run_jobs(make_jobs(changed)))
    # nor with other captions
    shutil.copytree(made / "images", tmp_path / "images")
    (tmp_path / "images/a/0.txt").write_text("another")
    changed = options_for(made, out, source=str(tmp_path / "images"))
    with pytest.raises(ValueError, match="text/clip was begun with source_sha256 .*this run has"):
        list(run_jobs(make_jobs(changed)))


def test_a_row_of_several_encoders_makes_small_shards(made, monkeypatch, tmp_path):
    monkeypatch.setattr("sra_fast.data.text_jobs.SHARD_BYTES", 3 * 4 * (20 * 16 + 16 + 20))
    jobs = make_jobs(options_for(made, tmp_path / "out"))
    assert [job.recipe["shard_size"] for job in jobs] == [5, 5, 3, 3]


def test_images_that_were_skipped_have_no_captions(made, tmp_path):
    """And the captions of the others stay with them."""
    shutil.copytree(made / "images", tmp_path / "images")
    bad = tmp_path / "images/b/2.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:300])
    out = tmp_path / "out"
    args = ("--source", tmp_path / "images", "--out", out, "--captions", "txt")
    args += ("--text-encoders", made / "clip")
    said = preprocess(
        *args, "--pixels", "true", "--resolution", 16, "--bad", "skip", "--mirror", "true"
    )
    assert "text/clip: 18 captions of 22 images" in said
    train = opened(out)
    names = sorted(n for part in held_names(made) for n in part if n != "b/2.jpg")
    assert len(train) == 2 * len(names)
    for image in range(len(train)):
        found = [train.text.caption(image, k) for k in range(train.text.count(image))]
        assert found == captions_of(names[image // 2])
    preprocess(*args, "--text_name", "again")
    assert opened(out, "again").text.fingerprint == train.text.fingerprint
    bad.write_bytes(whole)
    done = call("preprocess", *args, "--text_name", "late")
    assert "out holds 22 images, captions were made of 24" in error_of(done)
    with pytest.raises(ValueError, match="text/late is not finished"):
        opened(out, "late")
    # as many images of each class, and others
    (tmp_path / "images/b/1.png").write_bytes(whole[:300])
    done = call("preprocess", *args, "--text_name", "others")
    assert "out was made without other images than captions: have images" in error_of(done)
    for file in (tmp_path / "images").rglob("*.*g"):
        file.write_bytes(b"broken")
    done = call("preprocess", *args, "--text_name", "none")
    assert f"a/0.jpg has changed since {out} was made of it" in error_of(done)
    # the records of earlier versions say nothing of the files
    for part in (out / "parts").iterdir():
        record = json.loads(part.read_text())
        del record["marks"]
        part.write_text(json.dumps(record))
    done = call("preprocess", *args, "--text_name", "none")
    assert error_of(done) == "error: no image could be read"


# which caption of an image


def test_the_caption_is_a_function_of_seed_step_and_image(made):
    text = opened(made / "data").text
    chosen = {}
    for step in range(40):
        numbers = ImageNumbers(range(18), seed=7, step=step)
        chosen[step] = text.choose(numbers)
        for image, k in zip(numbers, chosen[step], strict=True):
            assert k == block_seed(7, step, image, -5) % text.count(image)
        # the images' order and company make no difference
        assert text.choose(ImageNumbers([17, 3], 7, step)) == [chosen[step][17], chosen[step][3]]
    # every caption is drawn, with about equal chances
    three = next(image for image in range(18) if text.count(image) == 3)
    drawn = [chosen[step][three] for step in range(40)]
    assert min(drawn.count(k) for k in range(3)) >= 6
    assert text.choose(ImageNumbers(range(18), 8, 0)) != chosen[0]
    assert text.choose([0, 1, 2]) == [0, 0, 0]
    read = text.read(ImageNumbers([three, 0], 7, 3))
    pairs = [(three, chosen[3][three]), (0, chosen[3][0])]
    assert torch.equal(read.tokens, text.read_captions(pairs).tokens)


def test_batches_do_not_depend_on_processes_and_micro_batches(made):
    data = opened(made / "data")

    def tokens_of(micro, accumulation, world, workers=0):
        """(step, image) -> the tokens that it came with."""
        found = {}
        for rank in range(world):
            sizes = (len(data), 5, micro, accumulation, rank, world, 0, 3)
            order = [*ShuffledBatches(*sizes)]
            with Batches(data, ShuffledBatches(*sizes), workers, False) as batches:
                for numbers, batch in zip(order, batches, strict=True):
                    _, (tokens, pooled), _ = data.split(batch)
                    for row, image in enumerate(numbers):
                        found[numbers.step, image] = (tokens[row], pooled[row])
        return found

    one = tokens_of(8, 1, 1)
    assert len(one) == 24
    for other in (tokens_of(2, 2, 2), tokens_of(4, 2, 1, workers=2)):
        assert other.keys() == one.keys()
        for key, pair in one.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, other[key], strict=True))


def test_numbers_are_a_list_that_survives_pickling():
    order = ShuffledBatches(40, 3, 8, 1, 0, 1, 0, 9)
    numbers = order.numbers(4, 0)
    again = pickle.loads(pickle.dumps(numbers))
    assert again == numbers == [*numbers] and (again.seed, again.step) == (3, 4)
    assert type(again) is ImageNumbers and json.dumps(numbers) == json.dumps([*numbers])


# what a model is told


def config(path, pooled=None, **options) -> Config:
    model = ModelConfig(name="MMDiT-S/2", pooled_size=pooled)
    train = TrainConfig(global_batch=4)
    data = DataConfig(path=str(path), **options)
    return Config(model, AlignConfig(target="none"), data=data, train=train)


def test_a_model_of_text_opens_it_and_takes_its_sizes(made):
    cfg = config(made / "data")
    data = make_dataset(cfg)
    assert data.text.name == cfg.data.text == "clip"
    sizes = (cfg.model.context_tokens, cfg.model.context_size, cfg.model.pooled_size)
    assert sizes == (20, 16, 16)
    model = cfg.model.build()
    images, tensors, _ = data.split(data.__getitems__([0, 5]))
    out = model(images.float(), torch.tensor([0.1, 0.5]), data.condition(tensors))
    assert out.shape == images.shape
    # one that leaves the pooled vector aside
    assert make_dataset(config(made / "data", pooled=0)).text.pooled == 16
    for option, value in (("context_tokens", 77), ("context_size", 768), ("pooled_size", 8)):
        cfg = config(made / "data")
        setattr(cfg.model, option, value)
        message = f"takes text features of model.{option} {value}, .*text/clip has (20|16)$"
        with pytest.raises(ValueError, match=message):
            make_dataset(cfg)


def test_images_with_captions_need_no_classes(made, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (made / "images/a").iterdir():
        shutil.copy(file, flat)
    preprocess(
        *("--source", flat, "--out", tmp_path / "data", "--pixels", "true", "--resolution", 16),
        *("--captions", "txt", "--text-encoders", made / "clip"),
    )
    data = make_dataset(config(tmp_path / "data"))
    assert data.num_classes == 1 and len(data) == 4
    cfg = config(tmp_path / "data")
    cfg.train.global_batch = 5
    with pytest.raises(
        ValueError, match="global_batch 5 is larger than the data set .*, at most 4$"
    ):
        make_dataset(cfg)


def test_text_that_is_not_there_or_not_asked_for_is_one_line(made, data, tmp_path):
    with pytest.raises(ValueError, match="data.text other: .*data has none of this name, but clip"):
        make_dataset(config(data, text="other"))
    for name in ("../clip", ""):
        with pytest.raises(ValueError, match="data.text must be the name of a folder"):
            make_dataset(config(data, text=name))
    shutil.copytree(data / "text/clip", data / "text/two")
    message = "data has the text features clip, two: data.text must name one of them"
    with pytest.raises(ValueError, match=message):
        make_dataset(config(data))
    assert make_dataset(config(data, text="two")).text.name == "two"
    shutil.rmtree(data / "text")
    with pytest.raises(ValueError, match="data has no text features: preprocess.py --captions"):
        make_dataset(config(data))
    cfg = config(made / "data", text="clip")
    cfg.model = ModelConfig(name="SiT-S/2")
    with pytest.raises(ValueError, match="for models of text, SiT-S/2 takes labels; got clip"):
        make_dataset(cfg)
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8))
    with pytest.raises(
        ValueError, match="the model takes captions, which packed data .* may have; these"
    ):
        make_dataset(config(tmp_path / "x.npz"))


def test_other_text_is_other_data(made, data):
    facts = opened(data).facts()
    assert facts.text["encoders"][0]["class"] == "CLIPTextModel"
    assert facts.text["paths"] == [str(made / "clip")]
    assert DataFacts.from_json(json.loads(json.dumps(facts.as_json()))) == facts
    without = open_data(DataConfig(path=str(data))).facts()
    assert without.text is None
    assert differences(without, facts) == differences(facts, without) == []
    args = ("--source", made / "images", "--out", data)
    preprocess(*args, "--captions", "txt", "--text-encoders", made / "other")
    other = opened(data, "other").facts()
    message = "features of another text encoder (other, it had clip)"
    assert differences(other, facts) == [message]
    names = [name for part in held_names(made) for name in part]
    listed = data.parent / "list.json"
    listed.write_text(json.dumps({name: "another" for name in names}))
    preprocess(*(*args, "--captions", listed, "--text-encoders", made / "clip", "--text_name", "b"))
    assert differences(opened(data, "b").facts(), facts) == ["other captions (b, it had clip)"]
    # the same under another name
    shutil.copytree(data / "text/clip", data / "text/copy")
    assert differences(opened(data, "copy").facts(), facts) == []


# damage


def damage(folder, change):
    """Change a set of text features."""
    if change in ("null.npy", "captions.jsonl", "shards/00001.npy"):
        held = bytearray((folder / change).read_bytes())
        held[-3] ^= 1
        (folder / change).write_bytes(held)
    elif change == "cut":
        path = folder / "shards/00001.npy"
        path.write_bytes(path.read_bytes()[:-8])
    elif change == "gone":
        (folder / "null.npy").unlink()
    else:
        index = json.loads((folder / "index.json").read_text())
        write_json(folder / "index.json", {**index, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ("cut", r"text/clip: shards/00001.npy has \d+ bytes instead of"),
        ("null.npy", "clip/null.npy was altered or cannot be read: its SHA-256"),
        ("gone", "clip/null.npy was altered or cannot be read: .*No such file"),
        ({"data_sha256": "0"}, "text/clip holds captions of other images than .*data: make them"),
        ({"kind": "features"}, "text/clip holds features, text were expected"),
        ({"tokens": 21}, r"index.json is no index of text features: .*rows must be 373 long, got"),
        (
            {"captions": {}, "null": None},
            "index.json is no index of text features: 'NoneType' object",
        ),
    ],
)
def test_damaged_text_is_named_before_training(data, change, message):
    damage(data / "text/clip", change)
    with pytest.raises(ValueError, match=message):
        opened(data)


def test_captions_of_images_in_another_order_are_refused(data):
    labels = np.load(data / "text/clip/labels.npy")
    np.save(data / "text/clip/labels.npy", labels[::-1].copy())
    damage(data / "text/clip", {"labels": file_entry(data / "text/clip", "labels.npy")})
    with pytest.raises(ValueError, match="must have the images of the captions in their order"):
        opened(data)


def test_altered_shards_and_captions_are_named_when_they_are_read(data):
    damage(data / "text/clip", "shards/00001.npy")
    train = opened(data, verify=True)
    train.text.read([0])
    with pytest.raises(ValueError, match="text/clip/shards/00001.npy was altered"):
        train.text.read([17, 9])
    opened(data).text.read([17, 9])
    damage(data / "text/clip", "captions.jsonl")
    text = opened(data).text
    assert text.texts
    with pytest.raises(ValueError, match="clip/captions.jsonl was altered .*its SHA-256"):
        text.caption(0, 0)


def test_the_same_command_mends_what_was_altered(made, data):
    packing(made, data)
    before = tree(made / "data")
    assert tree(data) == before
    for name in ("null.npy", "captions.jsonl"):
        damage(data / "text/clip", name)
    damage(data / "held_out/text/clip", "cut")
    packing(made, data)
    assert tree(data) == before
    # the empty prompt is not made anew as long as it is whole: runs know it, and another device
    # would give other bits
    folder = data / "text/clip"
    damage(folder, "null.npy")
    damage(folder, {"null": file_entry(folder, "null.npy")})
    other = tree(data)
    packing(made, data)
    assert tree(data) == other != before


def test_features_that_are_not_finite_stop_the_job(made, tmp_path):
    jobs = make_jobs(options_for(made, tmp_path / "out"))
    encode = jobs[-1].encode
    jobs[-1].encode = lambda ids: encode(ids) / 0
    message = "text of captions 0 .. 4 are not finite in torch.float32"
    with pytest.raises(ValueError, match=message):
        list(run_jobs(jobs))


@pytest.mark.parametrize(
    "args, message",
    [
        ("--captions txt", "captions need text_encoders, folders of CLIP or T5, got nothing"),
        ("--text-encoders {root}/clip", "text_encoders see captions: give captions .txt, JSON"),
        ("--text_tokens 8", "--text_tokens is for captions, .*images was given without --captions"),
        ("--text_name x", "--text_name is for captions, .*images was given without --captions"),
        (
            "--captions txt --text-encoders {root}/clip --text-name a/b",
            "text_name must be the name",
        ),
        (
            "--captions txt --text-encoders {root}/clip --text_tokens 40",
            "at most 20 for .*clip, got",
        ),
        ("--captions txt --text-encoders {root}/images", "there is no config.json in .*images"),
        ("--captions {tmp}/no.json --text-encoders {root}/clip", "there is no file .*no.json"),
        (
            "--captions txt --text-encoders {root}/clip --layout published",
            "text features are packed beside packed data, got layout published",
        ),
        (
            "--captions txt --text-encoders {root}/clip --bad list",
            "bad list makes nothing, got capt",
        ),
        (
            "--captions txt --text-encoders {root}/clip --source {root}/data",
            "--captions is for images, .*data holds no images but a data set",
        ),
        (
            "--captions txt --text-encoders {root}/clip --pixels false",
            "captions need vae or pixels true, or an out that is finished packed data; .*new",
        ),
        (
            "--captions txt --text-encoders {root}/clip --source {tmp}/bare",
            "no caption for 12 imag",
        ),
    ],
)
def test_what_cannot_be_is_one_line(made, tmp_path, args, message):
    """Nothing is written before everything has been looked at."""
    if "bare" in args:
        write_images(tmp_path / "bare")
    words = args.format(root=made, tmp=tmp_path).split()
    if "--source" not in words:
        words += ["--source", str(made / "images")]
    if "--pixels" not in words:
        words += ["--pixels", "true" if "/data" not in args else "false"]
    done = call("preprocess", *words, "--out", tmp_path / "new")
    assert done.returncode == 2
    line = error_of(done)
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "new").exists()


# MS-COCO as U-ViT and REPA have it


def write_coco_features(root, images=12, val=2, length=6, width=4):
    """Moments, features of captions and images, with the numbers in the names."""
    rng = np.random.default_rng(0)
    for part, count in (("train", images), ("val", val)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            moments = rng.normal(size=(8, 2, 2)).astype(np.float32)
            moments[4:] -= 10
            # U-ViT writes no batch dimension, REPA allows one
            np.save(root / part / f"{i}.npy", moments[None] if i % 2 else moments)
            for k in range(1 + i % 3):
                context = np.full((length, width), 100 * i + k, np.float32)
                np.save(root / part / f"{i}_{k}.npy", context)
    np.save(root / "empty_context.npy", np.full((length, width), -1, np.float32))
    return root


def test_u_vits_layout_is_packed_with_its_text(tmp_path):
    source = write_coco_features(tmp_path / "coco")
    said = preprocess(
        *("--source", source, "--out", tmp_path / "data", "--dtype", "float32"),
        *("--text_dtype", "float32"),
    )
    assert "data: 12 images of 1 class, moments 8 x 2 x 2" in said
    assert "text/clip: 24 captions of 12 images, text 6 x 4" in said
    assert "text features of an encoder that is not known" in said
    data = opened(tmp_path / "data")
    assert isinstance(data, PackedLatents) and data.normalization.scale == 0.18215
    # in the order of the files' names, as images in a folder are
    order = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    for row, number in enumerate(order):
        stored = np.load(source / f"train/{number}.npy").reshape(8, 2, 2)
        moments, tensors, _ = data.split(data.__getitems__([row]))
        assert torch.allclose(moments[0, :4], torch.from_numpy(stored[:4]))
        deviation = np.exp(0.5 * np.clip(stored[4:], -30, 20))
        assert torch.allclose(moments[0, 4:], torch.from_numpy(deviation))
        assert data.text.count(row) == 1 + number % 3
        for k in range(1 + number % 3):
            assert (data.text.read_captions([(row, k)]).tokens == 100 * number + k).all()
        condition = data.condition(tensors)
        assert condition.pooled is None and condition.mask is None
        assert (condition.empty.tokens == -1).all()
    assert data.text.caption(0, 0) is None and not data.text.texts
    assert data.text.facts["encoders"] is None
    held_out = data.held_out_split()[1][0]
    assert len(held_out) == len(held_out.text) == 2
    # a second run changes nothing
    before = tree(tmp_path / "data")
    preprocess(
        *("--source", source, "--out", tmp_path / "data", "--dtype", "float32"),
        *("--text_dtype", "float32"),
    )
    assert tree(tmp_path / "data") == before
    # the files are not read for that, but another encoder has another empty prompt
    np.save(source / "empty_context.npy", np.full((6, 4), -2, np.float32))
    done = call(
        *("preprocess", "--source", source, "--out", tmp_path / "data", "--dtype", "float32"),
        *("--text_dtype", "float32"),
    )
    assert "text/clip was begun with source_sha256" in error_of(done)


def test_the_images_beside_u_vits_files_have_features_in_the_same_order(tmp_path):
    from PIL import Image

    source = write_coco_features(tmp_path / "coco", val=0)
    shutil.rmtree(source / "val")
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(source / f"train/{i}.png")
    dino = write_vision_model(tmp_path / "dino", num_hidden_layers=1)
    preprocess(
        *("--source", source, "--out", tmp_path / "data", "--features", dino),
        *("--features_dtype", "float32", "--dtype", "float32"),
    )
    data = opened(tmp_path / "data")
    data.open_features("dino")
    from sra_fast.data.vision import load_vision_model, make_extractor

    extract = make_extractor(load_vision_model(str(dino)), 1, "fp32", torch.device("cpu"))
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0] = 20 * 10
    moments, _, features = data.split(data.__getitems__([2]))
    # row 2 is image 10
    assert torch.allclose(moments[0, :4], torch.from_numpy(np.load(source / "train/10.npy"))[:4])
    assert torch.allclose(features, extract(pixels), atol=1e-5)
    (source / "train/3.png").unlink()
    done = call(*("preprocess", "--source", source, "--out", tmp_path / "new", "--features", dino))
    assert "must hold an image of every number for --features, it has 11 images" in error_of(done)
    # later features and captions are of images with the same numbers
    (source / "train/3.png").write_bytes((source / "train/4.png").read_bytes())
    check_same_images(ImageFolder(source / "train", Crop(16)), tmp_path / "data")
    # images of other names may be in another order: nothing tells which of them belong to the rows,
    # also where these are packed anew
    preprocess("--source", tmp_path / "data", "--out", tmp_path / "copy")
    for i in range(12):
        other = tmp_path / f"other/COCO_{i:012d}.jpg"
        other.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(other)
    done = call(
        *("preprocess", "--source", other.parent, "--out", tmp_path / "copy"),
        *("--features", dino, "--features_name", "late"),
    )
    assert re.search("images of .*other must be named 0.png, 1.png, ...$", error_of(done))


@pytest.mark.parametrize(
    "change, message",
    [
        ("moments", "train lacks 1 moments, the first is 5.npy"),
        ("captions", "train has no captions of 1 images, the first is 3$"),
        ("a caption", r"train lacks captions of image 5: it has \[0, 2\]"),
        ("stranger", "train has captions of 1 images that are not there, the first is 30$"),
        ("deviations", "must be logarithms of variances, none of 12 images has a negative one"),
        ("shape", r"train/4.npy must hold moments \[8, 2, 2\], got \[8, 3, 3\]"),
        ("context", r"train/2_1.npy must hold features \[6, 4\], got \[5, 4\]"),
        ("empty", r"empty_context.npy must hold features \[L, E\], got \[4\]"),
        ("broken", "train/4.npy is no readable .npy file: it holds no plain array$"),
        ("--captions txt --text_encoders x", "--captions is for images, .* holds the features of"),
        ("--mirror true", "--mirror is for images, .* holds latents and features of their capt"),
        ("--text_name a/b", "text_name must be the name of a folder"),
    ],
)
def test_u_vits_layout_with_a_fault_is_one_line(tmp_path, change, message):
    source = write_coco_features(tmp_path / "coco")
    train = source / "train"
    if change == "moments":
        (train / "5.npy").unlink()
        for k in range(3):
            (train / f"5_{k}.npy").unlink()
    elif change == "captions":
        (train / "3_0.npy").unlink()
    elif change == "a caption":
        (train / "5_1.npy").unlink()
    elif change == "stranger":
        np.save(train / "30_0.npy", np.zeros((6, 4), np.float32))
    elif change == "deviations":
        for i in range(12):
            np.save(train / f"{i}.npy", np.abs(np.load(train / f"{i}.npy")))
    elif change == "shape":
        np.save(train / "4.npy", np.zeros((8, 3, 3), np.float32))
    elif change == "context":
        np.save(train / "2_1.npy", np.zeros((5, 4), np.float32))
    elif change == "empty":
        np.save(source / "empty_context.npy", np.zeros(4, np.float32))
    elif change == "broken":
        (train / "4.npy").write_bytes(b"no array")
    args = change.split() if change.startswith("--") else []
    done = call("preprocess", "--source", source, "--out", tmp_path / "data", *args)
    assert done.returncode == 2
    assert re.search(message, error_of(done)), error_of(done)


def test_moments_packed_anew_say_what_stays_behind(tmp_path):
    """A run on the new data set would miss its captions."""
    preprocess("--source", write_coco_features(tmp_path / "coco"), "--out", tmp_path / "data")
    said = preprocess("--source", tmp_path / "data", "--out", tmp_path / "new")
    note = f"not taken along from {tmp_path / 'data'}: text/clip"
    assert said.splitlines().count(note) == 1
    assert not (tmp_path / "new/text").exists()
    assert "not taken along" not in preprocess(
        *("--source", tmp_path / "new", "--out", tmp_path / "newer")
    )


def test_u_vits_layout_is_packed_before_a_run_reads_it(tmp_path):
    source = write_coco_features(tmp_path / "coco")
    with pytest.raises(ValueError, match="pack them first: sra-fast preprocess --source"):
        open_data(DataConfig(path=str(source)))


def test_opening_pickles_without_the_captions(made):
    text = StoredText(made / "data", None, PackedPixels(made / "data").fingerprint)
    assert text.caption(0, 0)
    again = pickle.loads(pickle.dumps(text))
    assert again._captions is None and again.caption(0, 0) == text.caption(0, 0)
