"""The paper's questions as runs of `configs/study.py`, at three scales."""

from collections.abc import Callable
from typing import Any

from videomae_jax.data import moving_digits
from videomae_jax.study.claims import Claim
from videomae_jax.study.questions import Question, Row
from videomae_jax.study.runner import Run
from videomae_jax.study.runs import Runs, Scale

_VIDEOS = 2048  # for training, in configs/study.py
_LABELS = (10, 100, 25, 5, 0, 2, 1)  # in the order in which one wants to know
_SSV2 = "ViT-B, Something-Something V2"

SCALES = {
    "smoke": Scale(
        seeds=2,
        steps=4,
        short=2,
        contrast=2,
        finetuning=2,
        labels=(1,),
        few=1,
        questions=("labels", "budget", "mask"),
        edits=(("data.generate.videos", 64), ("log.steps", 1)),
    ),
    "laptop": Scale(
        seeds=3,
        steps=15_000,
        short=6000,
        contrast=1200,
        finetuning=400,
        labels=_LABELS,
        few=10,
        more=15_000,
    ),
    "gpu": Scale(
        seeds=5, steps=100_000, short=20_000, contrast=10_000, finetuning=800, labels=_LABELS, few=10
    ),
}


class Plan(Runs):
    """The questions of a scale, and all runs behind them, each after those that it needs."""

    def __init__(self, scale: Scale):
        super().__init__(scale)
        asked = (_labels, _budget, _mask, _decoder, _target, _quantity, _domain, _epochs, _frozen)
        self.questions = [
            ask(self) for ask in asked if not scale.questions or ask.__name__[1:] in scale.questions
        ]


def _labels(plan: Runs) -> Question:
    scale, rows = plan.scale, []
    sides: dict[str, Callable[[int], Run | None]] = {
        "VideoMAE": lambda seed: plan.pretrained("long", seed, steps=scale.steps),
        "from scratch": lambda seed: None,
        "MoCo v3": lambda seed: plan.run("moco", f"stage=contrast,steps={scale.contrast}", seed),
    }
    for side, start in sides.items():
        for labels in scale.labels:
            rows.append(
                plan.row(
                    _of(side, labels),
                    lambda seed, start=start, labels=labels: plan.tested(start(seed), seed, labels),
                    x=float(labels or _VIDEOS // len(moving_digits.CLASSES)),
                    series=side,
                )
            )
    few = scale.few
    return Question(
        "labels",
        "Labels: from scratch, MoCo v3, VideoMAE",
        "Pretrained on all training videos without labels, then finetuned with some labels per class; the "
        f"recipe and the steps ({scale.finetuning}, with all labels {3 * scale.finetuning}) are the same on "
        "all sides. With many labels training from scratch is far from its end then: more steps would serve "
        f"it most. VideoMAE has {scale.steps:,} steps of 32 clips, MoCo v3 {scale.contrast:,} of 64, all "
        "tokens of which it looks at: about half of the time, so it is judged against a VideoMAE that had "
        "less yet.",
        tuple(rows),
        (
            Claim(
                f"VideoMAE beats training from scratch, {few} labels per class",
                _of("VideoMAE", few),
                _of("from scratch", few),
                "62.6 against 18.0 (HMDB51), 69.6 against 32.6 (SSv2)",
            ),
            Claim(
                "VideoMAE beats training from scratch, all labels",
                _of("VideoMAE", 0),
                _of("from scratch", 0),
                "80.0 against 68.8 (Kinetics-400)",
            ),
            Claim(
                f"VideoMAE of {scale.short:,} steps beats MoCo v3, {few} labels per class",
                _steps(scale.short),
                _of("MoCo v3", few),
                "62.6 against 39.2 (HMDB51), 69.6 against 54.2 (SSv2)",
            ),
        ),
        axis="labelled videos per class",
    )


def _of(side: str, labels: int) -> str:
    return f"{side}, {labels} per class" if labels else f"{side}, all labels"


def _budget(plan: Runs) -> Question:
    few, scratch = plan.scale.few, "from scratch"
    budgets = plan.budgets()
    rows = [
        plan.row(
            _steps(steps),
            lambda seed, start=start: plan.tested(start(seed), seed, few),
            x=float(steps),
            series="VideoMAE",
        )
        for steps, start in budgets.items()
    ]
    return Question(
        "budget",
        f"Budget: when pretraining pays, with {few} labels per class",
        "Finetuned as above after so many steps of pretraining. " + _more(plan),
        (plan.row(scratch, lambda seed: plan.tested(None, seed, few)), *rows),
        (),
        axis="steps of pretraining",
        baseline=scratch,
    )


def _steps(steps: int) -> str:
    return f"{steps:,} steps of pretraining"


def _more(plan: Runs) -> str:
    scale = plan.scale
    return (
        f"Those of {scale.steps + scale.more:,} steps are {scale.steps:,} and then {scale.more:,} with a "
        f"schedule of their own, of the same clips and masks as the first."
        if scale.more
        else ""
    )


def _mask(plan: Runs) -> Question:
    rows = [
        plan.usual("tube, 0.75", paper=68.0),
        plan.varied("frame, 0.75", "frame", ("mask.kind", "frame")),
    ]
    if plan.scale.questions == ():
        rows += [
            plan.varied("tube, 0.5", "tube_0.5", ("mask.ratio", 0.5)),
            plan.varied("tube, 0.9", "tube_0.9", ("mask.ratio", 0.9), paper=69.6),
            plan.varied(
                "random, 0.9", "random_0.9", ("mask.kind", "random"), ("mask.ratio", 0.9), paper=68.3
            ),
            plan.varied("tube, 0.94", "tube_0.94", ("mask.ratio", 0.94)),
            plan.varied("running cell (V2), 0.75", "running_cell", ("mask.decoder", "running_cell")),
        ]
    return Question(
        "mask",
        "Masking: which places, how many, and V2's decoder",
        f"{_short(plan)} With 16 places the ratios are 8, 12, 14 and 15 hidden; frame masking hides 3 of 4 "
        "slices.",
        tuple(rows),
        (
            Claim(
                "tube masking beats random masking",
                "tube, 0.9",
                "random, 0.9",
                "69.6 against 68.3",
                "Where people hardly move, a place that is seen at another time gives the answer away. A "
                "digit has left it by then, so it must be followed all the same, and is seen in more places.",
            ),
            Claim(
                "tube masking beats frame masking",
                "tube, 0.75",
                "frame, 0.75",
                "69.6 against 61.5",
                "The slice that frame masking leaves shows the whole digit, and what moves tells the others: "
                "much is learnt early. Videos of people hardly change from slice to slice, so that there it "
                "gives the answer away.",
            ),
            Claim(
                "0.9 is better than 0.75",
                "tube, 0.9",
                "tube, 0.75",
                "69.6 against 68.0",
                "Two of 16 places stay visible, mostly no digit: in so short a training hidden places "
                "become little better than the mean colour.",
            ),
            Claim(
                "0.75 is better than 0.5",
                "tube, 0.75",
                "tube, 0.5",
                "rises up to 0.9 (figure 5)",
                "Clips have 16 places and digits fill few of them: four may be too few to tell the others "
                "from, at least in so short a training.",
            ),
        ),
        source=_SSV2,
    )


def _short(plan: Runs) -> str:
    return (
        f"Short pretraining ({plan.scale.short:,} steps), read out by an attentive probe of frozen features "
        "with all labels, which takes seconds. The paper finetunes."
    )


def _decoder(plan: Runs) -> Question:
    return Question(
        "decoder",
        "Depth of the decoder",
        f"{_short(plan)} The encoder has 4 blocks here, 12 in the paper.",
        (
            plan.varied("1 block", "decoder_1", ("model.decoder.depth", 1), paper=68.5),
            plan.usual("2 blocks", paper=69.2),
            plan.varied("4 blocks", "decoder_4", ("model.decoder.depth", 4), paper=69.6),
            plan.varied("8 blocks", "decoder_8", ("model.decoder.depth", 8), paper=69.3),
        ),
        (
            Claim(
                "four blocks are better than one",
                "4 blocks",
                "1 block",
                "69.6 against 68.5",
                "Four blocks are as many as the encoder has: in so short a training they may do its work.",
            ),
            Claim("four blocks are better than eight", "4 blocks", "8 blocks", "69.6 against 69.3"),
        ),
        source=_SSV2,
    )


def _target(plan: Runs) -> Question:
    return Question(
        "target",
        "Target and loss",
        f"{_short(plan)} Pixels are the usual target here.",
        (
            plan.usual("pixels, mse"),
            plan.varied("pixels, l1", "l1", ("loss.kind", "l1")),
            plan.varied("pixels, smooth l1", "smooth_l1", ("loss.kind", "smooth_l1")),
            plan.varied("normalised, mse", "normalised", *_NORMALISED, paper=69.6),
        ),
        (
            Claim("mse is better than l1", "pixels, mse", "pixels, l1", "69.6 against 69.1"),
            Claim(
                "normalised targets beat pixels",
                "normalised, mse",
                "pixels, mse",
                "84.4 against 83.8 (ST-MAE)",
                "Every tubelet weighs the same then, however little contrast it has: most of the loss is the "
                "background, of which a hidden part cannot be told.",
            ),
        ),
        source=_SSV2,
    )


_NORMALISED = (("loss.normalize_target", True), ("log.statistics", "true"))


def _quantity(plan: Runs) -> Question:
    def part(share: int) -> Row:
        if share == 1:
            return plan.usual(f"{_VIDEOS} videos")
        videos = _VIDEOS // share
        return plan.varied(f"{videos} videos", f"videos_{videos}", ("data.generate.videos", videos))

    return Question(
        "quantity",
        "How many videos to pretrain on",
        f"{_short(plan)} As many steps for each number of videos.",
        tuple(part(share) for share in (8, 2, 1)),
        (
            Claim(
                "more videos are better, at equal steps",
                f"{_VIDEOS} videos",
                f"{_VIDEOS // 8} videos",
                "few videos do: 68.7 from 42,000 of SSv2, 69.6 from 169,000",
                "One generator makes them all: with clips from anywhere in time and random crops, few of its "
                "videos may have all of its variety. The paper too finds little between its sizes.",
            ),
        ),
    )


def _domain(plan: Runs) -> Question:
    def on(
        name: str, folder: str, *edits: tuple[str, Any], look: str = "a", paper: float | None = None
    ) -> Row:
        return plan.row(
            name,
            lambda seed: plan.probed(plan.pretrained(folder, seed, *edits, arg=f",look={look}")),
            paper=paper,
        )

    return Question(
        "domain",
        "Domain: where the pretraining videos come from",
        f"{_short(plan)} Probed and tested on look a always. Look b has the same classes in other "
        "textures, colours and speeds.",
        (
            plan.usual("look a, 2048 videos", paper=69.6),
            on("look b, 2048 videos", "look_b", look="b", paper=68.5),
            on("look b, 8192 videos", "look_b_8192", ("data.generate.videos", 8192), look="b"),
            on("look a, 8192 videos", "look_a_8192", ("data.generate.videos", 8192)),
        ),
        (
            Claim(
                "the target's own videos beat as many of another domain",
                "look a, 2048 videos",
                "look b, 2048 videos",
                "69.6 (SSv2) against 68.5 (Kinetics-400) on SSv2",
            ),
            Claim(
                "... and beat four times as many",
                "look a, 2048 videos",
                "look b, 8192 videos",
                "68.7 (42,000 of SSv2) against 68.5 (240,000 of Kinetics-400)",
            ),
        ),
        source=_SSV2,
    )


def _epochs(plan: Runs) -> Question:
    scale, rows = plan.scale, []
    for steps, start in plan.budgets().items():
        rows.append(
            plan.row(
                f"{steps:,} steps",
                lambda seed, start=start: plan.probed(start(seed)),
                x=float(steps),
                series="VideoMAE",
            )
        )
    half = f"{scale.short // 2:,} steps, then as many of latent targets"

    def student(seed: int) -> Run:
        teacher = plan.pretrained(f"steps_{scale.short // 2}", seed, steps=scale.short // 2)
        arg = f"stage=latent,steps={scale.short - scale.short // 2}"
        return plan.probed(plan.run("latent", arg, seed, teacher=teacher.name))

    rows.append(plan.row(half, student, x=float(scale.short), series="half of them a latent student"))
    return Question(
        "epochs",
        "Longer pretraining, and latent targets as a second stage",
        ("Read out by an attentive probe of frozen features, with all labels. " + _more(plan)).strip(),
        tuple(rows),
        (
            Claim(
                "longer pretraining is better",
                f"{scale.steps:,} steps",
                f"{scale.short // 2:,} steps",
                "70.8 (2,400 epochs) against 69.6 (800)",
            ),
            Claim(
                "a second stage of latent targets beats more of the first",
                half,
                f"{scale.short:,} steps",
                "not the paper's: SALT (arXiv 2509.24317)",
                f"The teacher has had {scale.short // 2:,} steps, after which its features say little yet.",
            ),
        ),
        axis="steps of pretraining",
    )


def _frozen(plan: Runs) -> Question:
    kinds = {"finetuned": "finetune", "attentive probe": "attentive", "linear probe": "linear", "k-NN": "knn"}
    papers = {"finetuned": 69.6, "linear probe": 38.9}

    def long(seed: int) -> Run:
        return plan.pretrained("long", seed, steps=plan.scale.steps)

    return Question(
        "frozen",
        "Frozen features and finetuning",
        f"The long pretraining ({plan.scale.steps:,} steps), all labels.",
        tuple(
            plan.row(
                name,
                lambda seed, stage=stage: plan.tested(long(seed), seed, 0, stage),
                paper=papers.get(name),
            )
            for name, stage in kinds.items()
        ),
        (
            Claim("finetuning beats a linear probe", "finetuned", "linear probe", "69.6 against 38.9"),
            Claim(
                "an attentive probe beats a linear one",
                "attentive probe",
                "linear probe",
                "65.5 against 41.3 (ViT-L, V-JEPA's protocol)",
            ),
        ),
        source=_SSV2,
    )
