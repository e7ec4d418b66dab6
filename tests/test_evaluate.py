"""The suites' scores: those of the metric libraries and in closed form, and what the command makes of its input."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ortho_group
from torch import nn

from ecdit.errors import UserError
from ecdit.evaluate import fid
from ecdit.evaluate.clip import Clip
from ecdit.evaluate.dsg import Question, read_questions, score_item
from ecdit.evaluate.fid import Inception, Statistics, frechet_distance
from ecdit.evaluate.geneval import DETECTOR, GenEvalSuite, read_summary
from ecdit.evaluate.paper import told
from ecdit.evaluate.parti import read_parti
from ecdit.evaluate.suite import Options, packages
from ecdit.evaluate.suites import SUITES, as_table, names_of
from ecdit.evaluate.vqa import LocalVqa, Server, open_vqa, says_yes
from ecdit.pictures import read_pixels
from tests.command import ecdit
from tests.metric_libraries import import_torchmetrics
from tests.test_layouts_cli import torchrun
from tests.test_train import complaint
from tests.tiny_judges import FEATURES, TinyInception, chat_server, make_clip, make_inception, make_vilt
from tests.tiny_runs import random_run

COLUMNS = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
QUESTIONS = f"""{COLUMNS},question_natural_language
whoops_5,A blue rubix cube,"cube",1,0,entity,whole,entity - whole (cube),Is there a cube?
whoops_5,A blue rubix cube,"cube, blue",2,1,attribute,color,"attribute - color (cube, blue)",Is the cube blue?
whoops_5,A blue rubix cube,"cube, new",3,"1,2",attribute,state,"attribute - state (cube, new)",Is the cube new?
vrd_7,a man on a horse,man,1,0,entity,whole,entity - whole (man),Is there a man?
"""
PARTI = 'Prompt\tCategory\tChallenge\tNote\na snail\tAnimals\tBasic\t\n"G I G" on a wall\tIllustrations\tWriting\tx\n'
METADATA = [
    {"tag": tag, "include": [{"class": "cow", "count": 1}], "prompt": f"a photo of {word}"}
    for tag, word in (("single_object", "a cow"), ("counting", "two cows"))
]
JUDGE = """
import argparse, json
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("images", "--outfile", "--model-path"):
    parser.add_argument(name)
args, results = parser.parse_args(), []
images, outfile = Path(args.images), args.outfile
assert (Path(args.model_path) / "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth").is_file()
for folder in sorted(images.iterdir()):
    metadata = json.loads((folder / "metadata.jsonl").read_text())
    for picture in sorted((folder / "samples").iterdir()):
        right = picture.stem == "0000" or metadata["tag"] == "counting"
        results.append({"filename": str(picture), "tag": metadata["tag"], "correct": right, "reason": ""})
Path(outfile).write_text("\\n".join(map(json.dumps, results)))
"""
SUMMARY = """
open("object_names.txt").close()  # as the real one does, where it is started
print("Summary\\n=======\\nTotal images: 4\\n% correct images: 75.00%\\n\\nTask breakdown\\n==============")
print("single_object    = 50.00% (1 / 2)\\ncounting         = 100.00% (2 / 2)\\n")
print("Overall score (avg. over tasks): 0.75000")
"""


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Weights, questions and prompts, as a user has them in files."""
    folder = tmp_path_factory.mktemp("judges")
    make_clip(folder / "clip")
    make_vilt(folder / "vilt")
    make_inception(folder / "inception.pt")
    torch.jit.script(nn.Linear(2, 2)).save(folder / "other.pt")
    (folder / "captions.txt").write_text("a red circle\na blue square\na star\n")
    (folder / "no-text.jsonl").write_text('{"tag": "counting", "include": [], "prompt": 5}\n')
    (folder / "questions.csv").write_text(QUESTIONS)
    (folder / "parti.tsv").write_text(PARTI)
    repository = folder / "geneval"
    for name, text in (
        ("evaluation/evaluate_images.py", JUDGE),
        ("evaluation/summary_scores.py", SUMMARY),
        ("evaluation/object_names.txt", "cow"),
        ("prompts/evaluation_metadata.jsonl", "\n".join(map(json.dumps, METADATA))),
    ):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    shutil.copytree(repository, folder / "lame")
    (folder / "lame/evaluation/evaluate_images.py").write_text("import mmdet")
    (folder / "detector").mkdir()
    (folder / "detector" / DETECTOR).touch()
    rng = np.random.default_rng(0)
    (folder / "reference").mkdir()
    for i, size in enumerate([(40, 30), (8, 8), (20, 50), (64, 64), (9, 9)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"reference/{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("evaluate") / "tiny")


# ------------------------------------------------------------------------------------------------------------ distances


def gaussian(mean, covariance):
    return Statistics(np.asarray(mean, float), np.asarray(covariance, float), 100)


def test_distances_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    d, axes = 6, ortho_group.rvs(6, random_state=0)
    m, n, s, t = rng.normal(size=d), rng.normal(size=d), rng.uniform(0.1, 3, d), rng.uniform(0.1, 3, d)
    a, b = gaussian(m, axes @ np.diag(s**2) @ axes.T), gaussian(n, axes @ np.diag(t**2) @ axes.T)
    # covariances that commute: |m - n|^2 + sum (s - t)^2
    assert frechet_distance(a, b) == pytest.approx(((m - n) ** 2).sum() + ((s - t) ** 2).sum(), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    # one covariance is singular, as it is with fewer pictures than features
    assert frechet_distance(gaussian(m, np.zeros((d, d))), b) == pytest.approx(((m - n) ** 2).sum() + (t**2).sum())
    # two dimensions, any covariances: Tr (AB)^(1/2) = (Tr AB + 2 (det AB)^(1/2))^(1/2)
    p, q = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    root = np.sqrt(np.trace(p @ q) + 2 * np.sqrt(np.linalg.det(p @ q)))
    expected = np.trace(p) + np.trace(q) - 2 * root
    assert frechet_distance(gaussian([0, 0], p), gaussian([0, 0], q)) == pytest.approx(expected, rel=1e-10)


class Flat(nn.Module):
    """The tiny Inception as torchmetrics calls a network of the user's."""

    num_features = FEATURES

    def __init__(self, file):
        super().__init__()
        self.network = TinyInception()
        self.network.load_state_dict(torch.jit.load(file).state_dict())

    def forward(self, x):
        return self.network(x, return_features=True)


def test_the_distance_is_torchmetrics(judges):
    torchmetrics = import_torchmetrics()
    metric = torchmetrics.image.fid.FrechetInceptionDistance(Flat(judges / "inception.pt"), input_img_size=(3, 8, 8))
    generator, sets = torch.Generator().manual_seed(0), []
    for bright, real in ((120, True), (256, False)):
        pictures = torch.randint(0, bright, (300, 3, 8, 8), dtype=torch.uint8, generator=generator)
        metric.update(pictures, real=real)
        sets.append(Inception(judges / "inception.pt").statistics(pictures.split(64)))
    assert frechet_distance(*sets) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_reference_statistics_are_kept_until_something_changes(judges, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights, folder = judges / "inception.pt", judges / "reference"
    asked = []
    squares = fid._squares
    monkeypatch.setattr(fid, "_squares", lambda files, side: asked.append(side) or squares(files, side))
    first = fid.reference_statistics(folder, 8, weights, Inception(weights))
    again = fid.reference_statistics(folder, 8, weights, Inception(weights))
    assert asked == [8] and np.array_equal(first.covariance, again.covariance) and again.count == 5
    fid.reference_statistics(folder, 16, weights, Inception(weights))
    (folder / "5.png").write_bytes((judges / "reference/0.jpg").read_bytes())
    more = fid.reference_statistics(folder, 8, weights, Inception(weights))
    (folder / "5.png").unlink()
    assert asked == [8, 16, 8] and more.count == 6


# --------------------------------------------------------------------------------------------------------- CLIP and VQA


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    paths = [folder / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(path)
    return paths


def test_clip_scores_are_torchmetrics(judges, pictures):
    torchmetrics = import_torchmetrics()
    clip = Clip(str(judges / "clip"))
    texts = ["red", "a star", "two", "q", "zebra", "blue ring"]
    ours = clip.scores(pictures, texts)
    theirs = [
        torchmetrics.functional.multimodal.clip_score(
            read_pixels(path).permute(2, 0, 1), text, model_name_or_path=lambda: (clip._model, clip._processor)
        )
        for path, text in zip(pictures, texts, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-4)
    assert ours.max() > 1
    long = clip.scores(pictures[:1], ["a" * 200])  # is cut as CLIP cuts it, with its end token kept
    assert torch.equal(long, clip.scores(pictures[:1], ["a" * 22]))


def test_a_local_model_answers_as_itself(judges, pictures):
    from transformers import ViltForQuestionAnswering, ViltProcessor

    model = ViltForQuestionAnswering.from_pretrained(judges / "vilt").eval()
    processor = ViltProcessor.from_pretrained(judges / "vilt")
    pairs = [(path, question) for path in pictures for question in ("is it red?", "a star?", "two?")]
    expected = []
    for path, question in pairs:
        inputs = processor(Image.open(path), question, return_tensors="pt")
        expected.append(model.config.id2label[model(**inputs).logits.argmax().item()])
    vqa = LocalVqa(str(judges / "vilt"))
    assert vqa.ask(pairs) == expected
    assert vqa.ask([(pictures[0], "a" * 99)]) == vqa.ask([(pictures[0], "a" * 60)])  # more than its 40 places


def test_a_server_is_asked_in_openais_protocol(pictures, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with chat_server(failures=1) as (url, asked):
        answers = open_vqa(url + "/", "gpt").ask([(pictures[0], "Is it red?"), (pictures[1], "Is it blue?")])
    assert answers == ["Yes.", "No"] and [says_yes(answer) for answer in answers] == [True, False]
    seen = {question["question"].split("?")[0]: question for question in asked if question}
    assert seen.keys() == {"Is it red", "Is it blue"}  # and once the server was busy
    assert {"model": "gpt", "key": "Bearer k", "size": (48, 48)}.items() <= seen["Is it red"].items()
    with chat_server() as (url, _), pytest.raises(UserError, match="answers 404"):
        Server(url + "/no", "gpt").ask([(pictures[0], "?")])
    with chat_server(answer=None) as (url, _), pytest.raises(UserError, match="answers no chat completion"):
        Server(url, "gpt").ask([(pictures[0], "?")])
    assert not says_yes("") and not says_yes("I see no yes") and says_yes(" YES, there is")


def test_parents_decide_what_counts():
    asked = [Question(number, parents, "", "") for number, parents in ((1, ()), (2, (1,)), (3, (2,)), (4, (9,)))]
    right = score_item(asked, {1: False, 2: True, 3: True, 4: True})
    assert right == {1: False, 2: False, 3: True, 4: True}  # 3 rests on an answer, not on what it counts for
    loose = [*asked[:3], Question(4, None, "a", "")]
    assert score_item(loose, {1: False, 2: True, 3: True, 4: True}) == {1: False, 2: True, 3: True, 4: True}


def test_files_of_prompts_are_read(judges, tmp_path):
    marked = tmp_path / "questions.csv"  # as Windows' programs write it
    marked.write_bytes(b"\xef\xbb\xbf" + (judges / "questions.csv").read_bytes())
    assert read_questions(marked) == read_questions(judges / "questions.csv")
    items = read_questions(judges / "questions.csv")
    assert [(item.name, item.category, len(item.questions)) for item in items] == [
        ("whoops_5", "defying", 3),
        ("vrd_7", "relation", 1),
    ]
    assert items[0].questions[2].parents == (1, 2)
    assert [row["Prompt"] for row in read_parti(judges / "parti.tsv")] == ["a snail", '"G I G" on a wall']
    with pytest.raises(UserError, match=r"summary_scores\.py prints no table"):
        read_summary("Traceback")


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_scores_several_suites_and_leaves_a_trace(run, judges, tmp_path, monkeypatch):
    """Two ranks draw, the first judges; one rank goes on from what they drew; the trace draws the pictures again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with chat_server() as (url, asked):
        command = [
            "evaluate", run.folder, "--suite", "fid,clip,geneval,dsg,parti", "--json", "-n", 2,
            "--prompts", judges / "captions.txt", "--reference", judges / "reference", "--inception",
            judges / "inception.pt", "--clip", judges / "clip", "--geneval", judges / "geneval", "--detector",
            judges / "detector", "--questions", judges / "questions.csv", "--vqa", url, "--vqa-model", "gpt",
            "--parti", judges / "parti.tsv",
        ]  # fmt: skip
        drawn = torchrun(2, "-m", "ecdit.cli", *map(str, command), "parallel.expert=2")
        assert drawn.returncode == 0, drawn.stderr
        questions = len(asked)
        again = ecdit(*command)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 pictures are there already" in again.stderr and len(asked) == questions == 8
    scores = json.loads(again.stdout)
    assert scores == json.loads(drawn.stdout) | {name: scores[name] for name in scores}
    assert scores["fid"]["pictures"] == 6 and scores["fid"]["reference_pictures"] == 5 and scores["fid"]["fid"] > 0
    assert scores["geneval"]["overall"] == 0.75 and scores["geneval"]["tasks"]["counting"]["score"] == 1
    assert scores["geneval"]["paper"]["overall"]["value"] == "71.68%"
    # whoops_5: a cube, not blue, so not "new and blue": 1 of 3; vrd_7: a man: 1 of 1
    assert scores["dsg"]["categories"] == {
        "defying": {"dsg": pytest.approx(1 / 3), "pictures": 2},
        "relation": {"dsg": 1, "pictures": 2},
    }
    assert scores["dsg"]["overall"] == pytest.approx(2 / 3)
    assert scores["dsg"]["questions"]["attribute"] == {"right": 0, "asked": 4}
    for name, one in scores.items():
        assert json.loads((run.folder / f"evaluate-{name}.json").read_text()) == one
        assert one["checkpoint"].startswith("step 3, ") and one["settings"]["steps"] == 3
    lines = [json.loads(line) for line in (run.folder / "evaluate/parti.jsonl").read_text().splitlines()]
    best = [max(lines[i : i + 2], key=lambda line: line["clip"]) for i in (0, 2)]
    assert scores["parti"]["best_clip_score"] == pytest.approx(np.mean([line["clip"] for line in best]))
    for number, line in enumerate(best):
        kept, drawn = (read_pixels(run.folder / "evaluate" / place) for place in
                       (f"parti/{number:04}.png", f"pictures/{line['file']}"))  # fmt: skip
        assert line["best"] and torch.equal(kept, drawn)
    layout = sorted(str(p.relative_to(run.folder / "evaluate/geneval/images")) for p in
                    (run.folder / "evaluate/geneval/images").rglob("*.*"))  # fmt: skip
    assert layout[:3] == ["00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0001.png"]
    assert json.loads((run.folder / "evaluate/geneval/images/00001/metadata.jsonl").read_text()) == METADATA[1]
    trace = run.folder / "evaluate/clip.jsonl"
    other = ecdit("sample", run.folder, "--prompts", trace, "-n", 1, "--out", tmp_path)
    assert other.returncode == 0, other.stderr
    for line in map(json.loads, trace.read_text().splitlines()):
        pixels = read_pixels(tmp_path / "samples" / line["file"])
        assert torch.equal(pixels, read_pixels(run.folder / "evaluate/pictures" / line["file"]))


def test_the_papers_row_stands_beside_ours():
    tasks = {name: {"score": 0.5, "pictures": 4} for name in ("single_object", "position")}
    scores = {"overall": 0.5, "pictures": 8, "tasks": tasks}
    table = as_table("geneval", scores, GenEvalSuite.rows(scores))
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("single_object", "50.00%", "4", ""),
        ("position", "50.00%", "4", ""),
        ("overall", "50.00%", "8", "71.68%"),
    ]
    # where it was read, and a suite without one says why
    assert told("geneval").endswith("abstract")
    for name in SUITES.keys() - {"samples"}:
        assert told(name).startswith("paper: ")
    assert told("samples") == ""


def options(judges, **changed):
    """All that the suites need, but for what is changed."""
    given = {
        "prompts": judges / "captions.txt", "reference": judges / "reference", "inception": judges / "inception.pt",
        "clip": judges / "clip", "questions": judges / "questions.csv", "vqa": judges / "vilt",
        "parti": judges / "parti.tsv", "geneval": judges / "geneval", "detector": judges / "detector",
    } | changed  # fmt: skip
    return [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("suite", "changed", "told"),
    [
        ("fod", {}, "--suite: 'fod' is not known; valid: samples, shapes, fid, clip, geneval, dsg, parti"),
        ("shapes", {}, "judges pictures of 32x32; data.resolution of this run is 8"),
        ("fid", {"reference": None}, "--suite fid: needs --reference: the folder of the real pictures"),
        ("fid", {"prompts": "nowhere.txt"}, "nowhere.txt: cannot read this prompts file: No such file"),
        ("fid", {"reference": "nowhere"}, "--reference: nowhere: no such folder"),
        ("fid", {"reference": "."}, "captions.txt: no picture"),
        ("fid", {"inception": "captions.txt"}, "captions.txt: no TorchScript module"),
        ("fid", {"inception": "other.pt"}, "--inception: other.pt: makes no features of pictures: "),
        ("clip", {"clip": "./nowhere"}, "--clip: './nowhere': no such folder"),
        ("clip", {"clip": "geneval"}, "cannot be loaded as a CLIP with its processor"),
        ("clip", {"clip": "vilt"}, "more; valid: weights of a CLIPModel"),
        (
            "dsg",
            {"questions": "parti.tsv"},
            "parti.tsv: valid: a csv file as dsg-1k-anns.csv, with columns item_id, text",
        ),
        ("dsg", {"vqa": "http://127.0.0.1:9/v1"}, "is a server: needs --vqa-model"),
        ("dsg", {"vqa": "http://127.0.0.1:9/v1", "vqa_model": "x"}, "--vqa: http://127.0.0.1:9/v1 cannot be reached: "),
        ("dsg", {"vqa": "./nowhere"}, "--vqa: './nowhere': no such folder"),
        ("parti", {"parti": "questions.csv"}, "questions.csv: valid: PartiPrompts.tsv, with columns Prompt"),
        ("geneval", {"geneval": "clip"}, "--geneval: clip/evaluation/evaluate_images.py: no such file"),
        (
            "geneval",
            {"metadata": "captions.txt"},
            "captions.txt, line 1: valid: an object with tag, include and prompt",
        ),
        (
            "geneval",
            {"metadata": "no-text.jsonl"},
            "no-text.jsonl, line 1: valid: an object with tag, include and prompt",
        ),
        ("geneval", {"metadata": "inception.pt"}, "--metadata: inception.pt: is no UTF-8 text; valid: GenEval"),
        ("geneval", {"geneval": None, "detector": None}, "--suite geneval: needs --metadata"),
        ("geneval", {"geneval": None}, "--detector: is for GenEval's scorer: needs --geneval, the folder of its repos"),
        ("geneval", {"detector": "clip"}, f"--detector: clip/{DETECTOR}: no such file"),
        ("geneval", {"geneval_python": "./python9"}, "--geneval-python: ./python9: No such file or directory"),
        ("geneval", {"geneval": "lame"}, "ModuleNotFoundError: No module named 'mmdet'; valid: GenEval's own env"),
    ],
)
def test_bad_input_is_named(run, judges, suite, changed, told, monkeypatch):
    monkeypatch.chdir(judges)
    values = options(judges, **changed)
    given = {name.removeprefix("--"): value for name, value in zip(values[::2], values[1::2], strict=True)}
    paths = {"prompts", "reference", "inception", "metadata", "geneval", "detector", "questions", "parti"}
    given = {name: Path(value) if name in paths else value for name, value in given.items()}
    with pytest.raises(UserError) as error:
        (name,) = names_of(suite)
        SUITES[name](Options(run.folder / "evaluate", **given), run.recipe()).load()
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_command_ends_with_2(run, judges):
    message = complaint(ecdit("evaluate", run.folder, "--suite", "clip", *options(judges, prompts=None)))
    assert message.startswith("ecdit: --suite clip: needs --prompts: a file of captions") and message.count("\n") == 1


def test_a_package_that_is_missing_is_named_with_its_extra():
    with pytest.raises(UserError, match=r"--suite clip: needs the package nowhere; install the extra `ecdit\[eval\]`"):
        packages("clip", "nowhere")


def test_questions_that_are_no_rows(tmp_path):
    rows = list(csv.reader(QUESTIONS.splitlines()))
    rows[2][3] = "two"
    with (tmp_path / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match="row 3: proposition_id: 'two'; valid: a whole number"):
        read_questions(tmp_path / "q.csv")
