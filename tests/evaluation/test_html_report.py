"""report.html and blind_ab.html: complete without any other file, and usable by keyboard in a browser."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_pipeline.evaluation.html_report import (
    Column,
    data_uris,
    gallery_columns,
    render,
    write_pages,
)
from sdxl_pipeline.evaluation.page_content import loss_curve, timesteps
from sdxl_pipeline.evaluation.report import paired_difference
from sdxl_pipeline.evaluation.verdict import findings, headline
from sdxl_pipeline.runtime.evaluation_report import (
    CheckpointLoss,
    EvaluationReport,
    LossSummary,
    Memorisation,
    MemorisedPair,
    Overfitting,
    PairedDifference,
    ProbeGap,
    ScorePair,
    Scores,
    Selection,
    Veto,
)
from sdxl_pipeline.runtime.specs import FailedItem, ValidationImage
from sdxl_pipeline.training.logging.run_logs import EvalRow
from tests.support.chromium import needs_chromium, run_in_page

STEPS = (10, 20, 30)
TEXT = 'a "red" zorp </script><script>document.title = "broken"</script> & more'


def loss(mean: float, images: str = "abcd") -> LossSummary:
    by_image = tuple((name, mean + 0.01 * index) for index, name in enumerate(images))
    return LossSummary(mean=mean, by_timestep=((100, 2 * mean), (900, mean)), by_image=by_image)


def images_of(folder: Path, step: int, scale: float = 1.0, size: int = 24) -> list[ValidationImage]:
    folder.mkdir(exist_ok=True)
    written = []
    for seed, name in enumerate(("zorp", "heart")):
        path = folder / f"{name}_{step}_{scale}.png"
        pixels = np.random.default_rng(seed + step).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        prompt = TEXT if name == "zorp" else "a heart"
        written.append(
            ValidationImage(step=step, name=name, prompt=prompt, path=str(path), seed=seed, scale=scale)
        )
    return written


def make_report(folder: Path, **changes: object) -> EvaluationReport:
    """Return a report of three checkpoints, of which step 20 is selected."""
    base = loss(0.2)
    values = dict(zip(STEPS, (loss(0.15), loss(0.1), loss(0.12)), strict=True))
    before = dict(base.by_image)
    content: dict[str, object] = {
        "identity": "d27e447c1fdb",
        "reused": False,
        "run_identity": "1911f4da",
        "step": 20,
        "lora_sha256": "0" * 64,
        "eval_source": "eval dataset",
        "eval_images": 4,
        "base_loss": base,
        "lora_loss": values[20],
        "base_probe": loss(0.19, "pq"),
        "checkpoints": tuple(
            CheckpointLoss(
                step=step,
                weights="trained",
                sha256="0",
                held_out=value,
                probe=loss(value.mean - step / 1000, "pq"),
                to_base=paired_difference(value, before),
                gap=ProbeGap(mean=0.01, standard_error=0.002),
            )
            for step, value in values.items()
        ),
        "selected": Selection(
            requested="best",
            step=20,
            weights="trained",
            best_step=20,
            within_one_error=(20,),
            vetoes=(Veto(step=10, reason="an image is black"),),
            text="Step 20 has the lowest held-out loss.",
        ),
        "overfitting": Overfitting(
            conclusive=True, from_step=30, gap=None, text="Over-fitting from step 30."
        ),
        "scores": Scores(
            fidelity=ScorePair(
                base=0.5,
                lora=0.75,
                difference=PairedDifference(images=4, mean=0.25, standard_error=0.01),
                ceiling=0.9,
            ),
            omitted={"clip": "CLIP score: not reported."},
            notes={"fidelity": "Few images."},
        ),
        "base_clip": None,
        "lora_clip": None,
        "gallery_path": "gallery.png",
        "images": (*images_of(folder / "images", 0), *images_of(folder / "images", 20)),
        "broken_images": (),
        "loss_plot_path": None,
        "report_path": str(folder / "report.md"),
        "difference_to_base": PairedDifference(images=4, mean=-0.1, standard_error=0.01),
        "change_since_release": {},
        "seconds": 1.0,
    }
    return EvaluationReport.model_validate(content | changes)


def with_memorisation(folder: Path, flagged: int) -> Memorisation:
    sample = images_of(folder / "pairs", 5)[0].path
    return Memorisation(
        samples=4,
        flagged=flagged,
        limit=0.1,
        calibrated_on=6,
        pairs=(
            MemorisedPair(
                image_path=sample,
                nearest="my/set/heart_5_1.0.png",
                similarity=0.97,
                correlation=0.8,
                flagged=bool(flagged),
            ),
        ),
        sheet_path=None,
        text=f"{flagged} of 4 samples are copies of training images.",
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    report = make_report(tmp_path, memorisation=with_memorisation(tmp_path, 0))
    others = [
        image
        for step, scale in ((10, 1.0), (30, 1.0), (20, 0.5))
        for image in images_of(tmp_path / "images", step, scale)
    ]
    rows = [EvalRow(step=15, loss=loss(0.13)), EvalRow(step=25, loss=loss(0.3, "other"))]
    paths = write_pages(
        report,
        tmp_path,
        title="demo",
        gallery=others,
        training_losses=rows,
        settings={"learning_rate": 1e-4, "lr_scheduler": "cosine"},
        images_by_dataset={"zorp": (42, 0)},
        data_dirs={"my": "/absent", "my/set": str(tmp_path / "pairs")},
    )
    assert paths.blind_ab == tmp_path / "blind_ab.html"
    return paths.report


def test_pages_contain_no_reference_to_a_network_or_file(page: Path):
    for path in (page, page.with_name("blind_ab.html")):
        text = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", path.read_text())
        assert not re.search(r"https?:|[\"'(]//|file:|@import|\burl\(|\bfetch\(|\bimport\b", text)
        assert str(page.parent) not in text
        assert "default-src 'none'" in text


def test_prompts_cannot_end_the_script_element(page: Path):
    text = page.read_text()
    assert text.count("</script>") == 2
    content = text.partition('id="content">')[2].partition("</script>")[0]
    assert json.loads(content)["prompts"][0]["text"] == TEXT


@needs_chromium
def test_report_in_browser_navigates_checkpoints_by_keyboard(page: Path):
    observed = run_in_page(
        page,
        """
        const state = () => [document.querySelector("#columns [aria-pressed=true]").textContent, document.querySelector("#tiles img.trained").alt.split(", ").at(-1)];
        const seen = {start: state(), title: document.title, headline: [$("headline").className, $("headline").textContent]};
        press("ArrowRight"); seen.right = state();
        press("ArrowRight"); seen.scale = state();
        press("ArrowRight"); seen.end = state();
        press("Home"); seen.home = state();
        press("s"); seen.selected = state();
        press("b"); seen.split = getComputedStyle(document.documentElement).getPropertyValue("--split");
        press("b"); seen.other = [getComputedStyle(document.documentElement).getPropertyValue("--split"), $("split").value];
        $("split").value = 30; $("split").dispatchEvent(new Event("input"));
        seen.clip = getComputedStyle(document.querySelector("#tiles img.trained")).clipPath;
        press("Enter"); press("ArrowDown"); seen.large = [$("large").open, $("large-text").textContent];
        press("ArrowLeft"); seen.largeColumn = $("large-column").textContent;
        $("close").click(); seen.closed = $("large").open;
        press("g"); seen.sheet = [$("tiles").hidden, document.querySelectorAll("#sheet img").length];
        const rectangle = document.querySelector("#by-step .over");
        seen.curve = [document.querySelectorAll("#by-step circle[data-step]").length, document.querySelector("#by-step .mark").dataset.selected, rectangle.dataset.from];
        const dot = step => Number(document.querySelector(`#by-step circle[data-step="${step}"]`).getAttribute("cx"));
        seen.places = [dot(20) === Number(document.querySelector("#by-step .mark").getAttribute("x1")), dot(30) >= Number(rectangle.getAttribute("x")) - 1e-6];
        seen.scores = [$("scores").querySelector("tbody").rows[0].lastChild.textContent, $("omitted-scores").textContent];
        seen.pairs = document.querySelectorAll("#pairs img").length;
        seen.rows = document.querySelectorAll("#checkpoints tbody tr").length;
        seen.visible = [...document.querySelectorAll("section")].filter(each => !each.hidden).map(each => each.id);
        seen.wide = document.documentElement.scrollWidth <= innerWidth;
        seen.broken = [...document.images].filter(image => image.complete && !image.naturalWidth).length;
        return seen;
        """,
    )
    assert observed["start"] == ["step 20", "step 20"]
    assert observed["right"] == ["step 30", "step 30"]
    assert observed["scale"] == observed["end"] == ["step 20 × 0.5", "step 20 × 0.5"]
    assert observed["home"] == ["step 10", "step 10"]
    assert observed["selected"] == ["step 20", "step 20"]
    assert observed["title"] == "Evaluation of demo"
    assert observed["headline"] == ["good", "Step 20 is better than the base model"]
    assert (observed["split"], observed["other"]) == ("0%", ["100%", "100"])
    assert "30%" in observed["clip"]
    assert observed["large"] == [True, "a heart (seed 1)"]
    assert observed["largeColumn"] == "step 10"
    assert observed["closed"] is False
    assert observed["sheet"] == [True, 10]
    assert observed["curve"] == [3, "20", "30"]
    assert observed["places"] == [True, True]
    note = "similarity to the training images; of the training images themselves: 0.9. Few images."
    assert observed["scores"] == [note, "CLIP score: not reported."]
    assert observed["pairs"] == 2
    assert observed["rows"] == 3
    assert observed["visible"] == ["gallery", "losses", "checkpoints", "scores", "memorisation", "inputs"]
    assert observed["wide"]
    assert observed["broken"] == 0


@needs_chromium
def test_blind_page_in_browser_hides_sides_and_counts_votes(page: Path):
    observed = run_in_page(
        page.with_name("blind_ab.html"),
        """
        const seen = {compared: [$("first").value, $("second").value].map(index => data.columns[index].label)};
        const orders = new Set(), first = Number($("first").value), second = Number($("second").value);
        for (let seed = 0; seed < 40; seed++) orders.add(JSON.stringify(plan(first, second, seed)));
        seen.orders = orders.size;
        seen.repeated = JSON.stringify(plan(first, second, 7)) === JSON.stringify(plan(first, second, 7));
        seen.test = [signTest(5, 0), signTest(3, 3), signTest(8, 2)];
        $("form").requestSubmit();
        seen.names = $("trial").innerText.includes("step");
        const better = () => trials[at].sides[0] === first ? "ArrowLeft" : "ArrowRight";
        press("ArrowDown"); press("ArrowUp"); press(better()); press("ArrowDown");
        seen.ended = !$("end").hidden;
        seen.votes = votes;
        seen.result = $("result").innerText;
        const link = HTMLAnchorElement.prototype, click = link.click;
        link.click = function () { seen.download = this.download; seen.href = this.href; };
        const create = URL.createObjectURL;
        URL.createObjectURL = blob => { seen.blob = blob.text(); return create(blob); };
        $("download").click();
        seen.blob = JSON.parse(await seen.blob);
        return seen;
        """,
    )
    assert observed["compared"] == ["step 20", "base model"]
    assert observed["orders"] == 8  # two orders of two prompts, with two sides each
    assert observed["repeated"] is True
    assert observed["test"] == [2 / 32, 1, 112 / 1024]
    assert observed["names"] is False
    assert observed["ended"] is True
    assert observed["votes"]["wins"] == [1, 0]
    assert observed["votes"]["ties"] == 1
    assert observed["votes"]["report"] == "d27e447c1fdb"
    assert {vote["prompt"] for vote in observed["votes"]["votes"]} == {"zorp", "heart"}
    assert observed["blob"] == observed["votes"]
    assert re.fullmatch(r"votes_d27e447c_\d+\.json", observed["download"])


def test_report_with_absent_fields_leaves_out_their_sections(tmp_path: Path):
    absent = (
        "base_loss",
        "lora_loss",
        "selected",
        "overfitting",
        "scores",
        "memorisation",
        "difference_to_base",
    )
    report = make_report(tmp_path, checkpoints=(), base_probe=None, **dict.fromkeys(absent))
    paths = write_pages(report, tmp_path, title="demo")
    text = paths.report.read_text()
    content = json.loads(text.partition('id="content">')[2].partition("</script>")[0])
    assert [content[key] for key in ("curve", "scores", "memorisation", "selection")] == [None] * 4
    assert content["checkpoints"] == content["timesteps"] == content["settings"] == []
    assert content["headline"] == {"state": "unknown", "text": "Step 20 cannot be evaluated completely"}


def test_report_without_two_columns_has_no_blind_page(tmp_path: Path):
    report = make_report(tmp_path, images=tuple(images_of(tmp_path / "images", 20)))
    assert write_pages(report, tmp_path, title="demo").blind_ab is None


def test_gallery_columns_are_base_then_steps_then_scales_of_the_selected():
    images = [
        ValidationImage(step=step, name="a", prompt="a", path="a", seed=0, scale=scale)
        for step, scale in ((20, 0.5), (30, 1.0), (20, 1.0), (0, 1.0), (20, 1.5))
    ]
    expected = [Column(0, 1), Column(20, 1), Column(30, 1), Column(20, 0.5), Column(20, 1.5)]
    assert gallery_columns(images, 20) == expected


@pytest.mark.parametrize(
    ("changes", "state", "title"),
    [
        ({"difference_to_base": PairedDifference(images=4, mean=-0.01, standard_error=0.01)}, "bad", "Not measurably better than the base model"),
        ({"broken_images": (FailedItem(name="zorp", reason="black"),)}, "bad", "Broken images"),
        ({"difference_to_release": PairedDifference(images=4, mean=0.1, standard_error=0.01)}, "warning", "Worse than the last release"),
        ({"overfitting": Overfitting(conclusive=True, from_step=20, gap=None, text="late")}, "warning", "Over-fitted"),
        ({"overfitting": Overfitting(conclusive=False, from_step=None, gap=None, text="few")}, "unknown", "Over-fitting unknown"),
        ({"selected": Selection(requested="best", step=20, weights="trained", best_step=20, vetoes=(Veto(step=20, reason="black"),), vetoed=True, text="")}, "bad", "Every checkpoint was refused"),
        ({"overfitting": None, "eval_images": 3}, "unknown", "Over-fitting unknown"),
    ],
)  # fmt: skip
def test_findings_begin_with_the_most_serious(tmp_path: Path, changes, state, title):
    report = make_report(tmp_path, **{"selected": None, "overfitting": None, **changes})
    verdict = findings(report)
    assert (verdict[0].state, verdict[0].title) == (state, title)
    assert headline(verdict, 20)["state"] == state
    assert {finding.state for finding in verdict[1:]} <= {"good"}


def test_findings_of_memorisation_depend_on_the_limit(tmp_path: Path):
    states = [
        findings(make_report(tmp_path, selected=None, memorisation=with_memorisation(tmp_path, flagged)))[
            0
        ].state
        for flagged in (0, 1)
    ]
    assert states == ["good", "bad"]


def test_loss_curve_adds_training_rows_of_the_same_images_only(tmp_path: Path):
    rows = [
        EvalRow(step=0, loss=loss(0.2)),
        EvalRow(step=15, loss=loss(0.13), probe=loss(0.11, "pq")),
        EvalRow(step=20, loss=loss(0.5)),
        EvalRow(step=25, loss=loss(0.3, "other")),
    ]
    curve = loss_curve(make_report(tmp_path), rows)
    assert curve is not None
    assert [(point["step"], point["heldOut"], point["kept"]) for point in curve["points"]] == [
        (10, 0.15, True),
        (15, 0.13, False),
        (20, 0.1, True),
        (30, 0.12, True),
    ]
    assert curve["points"][1]["probe"] == 0.11
    assert curve["overfittedFrom"] == 30


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path):
    diverged = LossSummary(mean=float("nan"), by_timestep=((100, float("inf")), (900, 0.1)))
    report = make_report(tmp_path)
    checkpoints = (report.checkpoints[0].model_copy(update={"held_out": diverged}), *report.checkpoints[1:])
    report = report.model_copy(update={"checkpoints": checkpoints, "lora_loss": diverged})
    curve = loss_curve(report)
    assert curve is not None
    assert [point["step"] for point in curve["points"]] == [20, 30]
    assert timesteps(report) == [[900, 0.2, 0.1]]
    assert write_pages(report, tmp_path, title="demo").report.is_file()


def test_data_uris_stay_within_the_budget(tmp_path: Path):
    paths = [image.path for image in images_of(tmp_path / "large", 1, size=170)]

    def used(uris: dict[str, str | None]) -> int:
        return sum(len(uri or "") for uri in uris.values())

    full = data_uris(paths, 10**7)
    smaller = data_uris(paths, used(full) - 1)
    assert all(full.values())
    assert all(smaller.values())
    assert used(smaller) < used(full)
    assert data_uris(paths, 100) == dict.fromkeys(paths)
    assert data_uris([str(tmp_path / "absent.png")], 100) == {str(tmp_path / "absent.png"): None}


def test_render_rejects_values_that_are_not_json():
    with pytest.raises(ValueError, match="JSON"):
        render("report.html", {"curve": float("nan")})
