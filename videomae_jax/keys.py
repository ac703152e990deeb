"""The table of settings: each key once, with its default, meaning, bounds, and who reads it."""

import dataclasses
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

TASKS = ("pretrain", "latent", "contrast", "finetune", "distill", "detect", "probe")

# Tasks by what they have in common.
TRAINED = ("pretrain", "latent", "contrast", "finetune", "distill", "detect")  # step by step
PIXELS = ("pretrain",)
MASKED = (*PIXELS, "latent")  # a masked encoder and a decoder
DISTILLED = ("distill",)
TAUGHT = ("latent", *DISTILLED)
CONTRAST = ("contrast",)
FINETUNED = ("finetune",)
CLASSIFIERS = (*FINETUNED, *DISTILLED)
DETECTORS = ("detect",)
ADAPTED = CLASSIFIERS + DETECTORS  # a backbone with a new head
PROBES = ("probe",)
LABELLED = CLASSIFIERS + PROBES
LISTED = (*MASKED, *CONTRAST, *LABELLED)  # videos of a folder or list
SELF_SUPERVISED = (*MASKED, *CONTRAST)
NEIGHBOURS = SELF_SUPERVISED + PROBES
CROPPED = CONTRAST + CLASSIFIERS
MIRRORED = CROPPED + DETECTORS
CONTINUED = (*PIXELS, *ADAPTED, *PROBES)  # from weights that there are


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        default: its value, whose type it keeps.
        meaning: what it is, with its unit.
        bounds: the interval that every number of it lies in; "(" and ")" leave the end out.
        read_by: tasks that read it; edited for another it would say something that is not so.
        is_free: whether it may differ when a work folder is resumed: no result depends on it.
    """

    default: Any
    meaning: str
    bounds: str = "(-inf, inf)"
    read_by: tuple[str, ...] = TASKS
    is_free: bool = False


KEYS: dict[str, Key] = {
    "task": Key("pretrain", " | ".join(TASKS)),
    "seed": Key(0, "of initialisation, data order, augmentation, masks", "[0, 2147483647]"),
    "init_from": Key(
        "",
        'export, checkpoint or work folder whose backbone training starts from; "": none',
        read_by=CONTINUED,
        is_free=True,
    ),
    "teacher": Key("", "weights of the frozen model that is learnt from", read_by=TAUGHT),
    "model.tubelet": Key((2, 16, 16), "voxels (t, p, p)", "[1, inf)"),
    "model.encoder.width": Key(768, "of a token", "[1, inf)"),
    "model.encoder.depth": Key(12, "blocks", "[1, inf)"),
    "model.encoder.num_heads": Key(12, "divide the width", "[1, inf)"),
    "model.encoder.mlp_dim": Key(3072, "hidden units of each block", "[1, inf)"),
    "model.decoder.width": Key(384, "of a token", "[1, inf)", read_by=MASKED),
    "model.decoder.depth": Key(4, "blocks", "[1, inf)", read_by=MASKED),
    "model.decoder.num_heads": Key(6, "divide the width", "[1, inf)", read_by=MASKED),
    "model.decoder.mlp_dim": Key(1536, "hidden units of each block", "[1, inf)", read_by=MASKED),
    "model.pixel_mean": Key(IMAGENET_MEAN, "per channel, of pixels in 0..1", read_by=TRAINED),
    "model.pixel_std": Key(IMAGENET_STD, "per channel, likewise", "(0, inf)", read_by=TRAINED),
    "model.position_resize": Key(
        "recompute", "table for other clip sizes: recompute | interpolate", read_by=TRAINED
    ),
    "model.norm_epsilon": Key(1e-06, "of every LayerNorm", "(0, inf)", read_by=TRAINED),
    "model.layer_scale": Key(0.0, "initial factor; 0: none", "[0, inf)", read_by=TRAINED),
    "model.drop_path": Key(0.0, "largest rate, of the last block", "[0, 1)", read_by=TRAINED),
    "model.dtype": Key("auto", "of matmuls: float32 | bfloat16 | auto (bfloat16 on GPU and TPU)"),
    "model.unroll": Key(
        1, "blocks per loop iteration; the depth: fastest step, slowest compile", "[1, inf)", is_free=True
    ),
    "model.remat": Key(
        "none",
        "computed again in the backward pass, to save memory: none | dots (all but matmuls) | full",
        read_by=TRAINED,
        is_free=True,
    ),
    "model.attention": Key(
        "auto",
        "xla | blocks (CPU) | queries (GPU) | cudnn (GPU, bfloat16) | splash (TPU) | auto (of these)",
        is_free=True,
    ),
    "head.kind": Key("softmax", "softmax (one class a video) | multilabel | regression", read_by=LABELLED),
    "head.pooling": Key("mean", "of tokens: mean | first", read_by=CLASSIFIERS),
    "head.dropout": Key(0.0, "of pooled features, in training", "[0, 1)", read_by=CLASSIFIERS),
    "head.scale": Key(0.001, "factor of its initial weights", "[0, inf)", read_by=ADAPTED),
    "mask.kind": Key(
        "tube", "tube | random | frame | multi_block (of places, in all slices)", read_by=MASKED
    ),
    "mask.ratio": Key(0.9, "share of places hidden", "(0, 1)", read_by=MASKED),
    "mask.decoder": Key("none", "none | running_cell (VideoMAE V2)", read_by=PIXELS),
    "mask.decoder_ratio": Key(0.5, "share of places that the running cell drops", "(0, 1)", read_by=PIXELS),
    "contrast.hidden": Key(4096, "units of the heads' hidden layers", "[1, inf)", read_by=CONTRAST),
    "contrast.width": Key(256, "of what is compared", "[1, inf)", read_by=CONTRAST),
    "contrast.temperature": Key(0.2, "of the softmax over the batch", "(0, inf)", read_by=CONTRAST),
    "contrast.momentum": Key(0.99, "of the momentum encoder, at the start", "[0, 1)", read_by=CONTRAST),
    "distill.temperature": Key(1.0, "that outputs are divided by", "(0, inf)", read_by=DISTILLED),
    "distill.hard_weight": Key(0.0, "of the loss with the labels", "[0, inf)", read_by=DISTILLED),
    "distill.feature_weight": Key(0.0, "of the features' distance", "[0, inf)", read_by=DISTILLED),
    "detect.boxes": Key(
        32, "of a training clip, at most; of more, some drawn at random", "[1, inf)", read_by=DETECTORS
    ),
    "detect.bins": Key(7, "parts of a box along each axis", "[1, inf)", read_by=DETECTORS),
    "detect.aligned": Key(False, "pixel centres half a pixel in; published: False", read_by=DETECTORS),
    "detect.short": Key(
        (256, 256), "least and largest short side of a training frame, pixels", "[1, inf)", read_by=DETECTORS
    ),
    "detect.test_short": Key(256, "of a test frame, whose shape is kept", "[1, inf)", read_by=DETECTORS),
    "detect.threshold": Key(
        0.8, "least score of a detector's box (detected_validation.csv)", "[0, 1]", read_by=DETECTORS
    ),
    "detect.colours": Key(True, "change hue, saturation and value of training clips", read_by=DETECTORS),
    "loss.kind": Key("mse", "mse | l1 | smooth_l1", read_by=MASKED),
    "loss.normalize_target": Key(True, "per tubelet and channel; False: pixels in 0..1", read_by=PIXELS),
    "loss.smoothing": Key(0.1, "of the labels' distributions", "[0, 1)", read_by=CLASSIFIERS),
    "loss.class_weights": Key(
        "none", "none | balanced (inverse to the classes' numbers of videos)", read_by=FINETUNED
    ),
    "data.path": Key(
        "", "folder of videos, CSV list, prepared data, or moving_shapes or moving_digits", is_free=True
    ),
    "data.root": Key(
        "", 'folder where relative paths of a list start; "": the list\'s', read_by=LISTED, is_free=True
    ),
    "data.allow_missing": Key(
        False, "leave out videos that a list names and that are not there", read_by=LISTED, is_free=True
    ),
    "data.frames": Key(16, "per clip", "[1, inf)"),
    "data.stride": Key(
        4, "frames of the file from one frame of the clip to the next; 0: one of each equal part", "[0, inf)"
    ),
    "data.size": Key((224, 224), "clip height and width, pixels", "[1, inf)"),
    "data.batch_size": Key(256, "clips per step, over all hosts", "[1, inf)", read_by=TRAINED),
    "data.held_out": Key(
        16,
        "videos kept for validation, at most a tenth; unless there is a part for it",
        "[0, inf)",
        read_by=LISTED,
    ),
    "data.max_videos_per_class": Key(
        0, "training videos, chosen by the hash of their names; 0: all", "[0, inf)", read_by=LABELLED
    ),
    "data.max_bad_fraction": Key(
        0.001,
        "of the set's videos that may fail to decode before the run stops",
        "[0, 1]",
        read_by=TRAINED,
        is_free=True,
    ),
    "data.clips_per_video": Key(
        1, "crops, with masks of their own, of the same decoded frames", "[1, inf)", read_by=TRAINED
    ),
    "data.resize": Key(
        "auto",
        "of training crops: host | device (of prepared data) | auto (device on GPU and TPU, where it can)",
        read_by=MASKED,
    ),
    "data.workers": Key(
        -1, "loader processes per host; 0: threads only; -1: by the usable cores", "[-1, inf)", is_free=True
    ),
    "data.loader_gib": Key(
        0.0, "of clips that a host's loader may hold; 0: a third of its memory", "[0, inf)", is_free=True
    ),
    "data.threads": Key(-1, "loader threads per process; -1: by the usable cores", "[-1, inf)", is_free=True),
    "data.generate.frames": Key(32, "of a generated video", "[1, inf)"),
    "data.generate.seed": Key(0, "of generated videos", "[0, 2147483647]"),
    "data.generate.size": Key(64, "side of generated videos, pixels", "[1, inf)"),
    "data.generate.videos": Key(2048, "generated for training", "[1, inf)"),
    "data.generate.look": Key("a", "domain of moving_digits: a | b"),
    "augment.policy": Key("rand-m7-n4-mstd0.5-inc1", 'of RandAugment; "": none', read_by=CLASSIFIERS),
    "augment.flip": Key(True, "mirror half of the clips; not where left and right matter", read_by=MIRRORED),
    "augment.area": Key((0.08, 1.0), "share of a frame that a crop takes", "(0, 1]", read_by=CROPPED),
    "augment.erasing": Key(
        0.25, "probability that a box of a clip becomes noise", "[0, 1]", read_by=CLASSIFIERS
    ),
    "augment.mixup": Key(0.8, "parameter of the Beta distribution; 0: none", "[0, inf)", read_by=CLASSIFIERS),
    "augment.cutmix": Key(1.0, "likewise", "[0, inf)", read_by=CLASSIFIERS),
    "augment.mix_probability": Key(1.0, "that a batch is mixed", "[0, 1]", read_by=CLASSIFIERS),
    "augment.mix_switch": Key(0.5, "probability of CutMix where both are on", "[0, 1]", read_by=CLASSIFIERS),
    "optim.unit": Key(
        "epochs", "of duration, warmup and every other `every`: epochs | steps", read_by=TRAINED
    ),
    "optim.duration": Key(800, "of training, in optim.unit", "(0, inf)", read_by=TRAINED),
    "optim.warmup": Key(40, "in optim.unit", "[0, inf)", read_by=TRAINED),
    "optim.lr": Key(
        0.00015,
        "per 256 videos: the rate used is lr * (videos in a step) / 256, as published",
        "(0, inf)",
        read_by=TRAINED,
    ),
    "optim.min_lr": Key(1e-05, "per 256 videos, likewise", "[0, inf)", read_by=TRAINED),
    "optim.betas": Key((0.9, 0.95), "of AdamW", "[0, 1)", read_by=TRAINED),
    "optim.epsilon": Key(1e-08, "of AdamW", "(0, inf)", read_by=TRAINED),
    "optim.weight_decay": Key(0.05, "of matrices, times the learning rate", "[0, inf)", read_by=TRAINED),
    "optim.clip_norm": Key(0.0, "limit on the global gradient norm; 0: none", "[0, inf)", read_by=TRAINED),
    "optim.max_skipped": Key(
        20,
        "steps in a row without a usable gradient before the run stops",
        "[1, inf)",
        read_by=TRAINED,
        is_free=True,
    ),
    "optim.accumulate": Key(
        1, "microbatches that a batch is cut into: less memory, the same update", "[1, inf)", read_by=TRAINED
    ),
    "optim.layer_decay": Key(
        1.0, "factor of the learning rate from a layer to the one below", "(0, 1]", read_by=ADAPTED
    ),
    "optim.freeze_blocks": Key(
        0, "the embedding and this many blocks stay as they are; 0: nothing", "[0, inf)", read_by=ADAPTED
    ),
    "optim.ema": Key(
        0.0,
        "decay of the average of the weights, which is then what counts; 0: none",
        "[0, 1)",
        read_by=ADAPTED,
    ),
    "optim.patience": Key(
        0,
        "evaluations without improvement before training ends early; 0: never",
        "[0, inf)",
        read_by=ADAPTED,
    ),
    "mesh.data": Key(
        -1,
        "devices that have copies of the state, each with rows of its own; -1: all that are left",
        "[-1, inf)",
        is_free=True,
    ),
    "mesh.fsdp": Key(
        1, "devices that share one copy of the state, each with rows of its own", "[1, inf)", is_free=True
    ),
    "mesh.tensor": Key(1, "devices that share a clip's heads and hidden units", "[1, inf)", is_free=True),
    "mesh.mapping": Key("jit", "jit | pmap (data parallel only)", read_by=TRAINED, is_free=True),
    "mesh.step_limit": Key(
        1800,
        "seconds that a step may take before the process ends with a stack dump; 0: no limit",
        "[0, inf)",
        is_free=True,
    ),
    "checkpoint.every": Key(20, "in optim.unit", "(0, inf)", read_by=TRAINED, is_free=True),
    "checkpoint.keep_last": Key(2, "checkpoints", "[1, inf)", read_by=TRAINED, is_free=True),
    "checkpoint.keep_every": Key(
        0, "in optim.unit: these are kept for ever; 0: none", "[0, inf)", read_by=TRAINED, is_free=True
    ),
    "evaluate.every": Key(
        0,
        "in optim.unit; 0: only at the end. Self-supervised tasks: k-NN",
        "[0, inf)",
        read_by=TRAINED,
    ),
    "evaluate.split": Key(
        "test",
        "that the command tests: test | validation | all (of a path without parts)",
        read_by=CLASSIFIERS,
        is_free=True,
    ),
    "evaluate.segments": Key(5, "test clips spread over a video", "[1, inf)", read_by=LABELLED),
    "evaluate.crops": Key(3, "of each, spread over the frame's long side", "[1, inf)", read_by=CLASSIFIERS),
    "evaluate.batch_videos": Key(8, "over all hosts; rounded up to the devices", "[1, inf)", is_free=True),
    "evaluate.allow_failed": Key(
        False,
        'report "N of M" instead of stopping where videos cannot be decoded',
        read_by=ADAPTED,
        is_free=True,
    ),
    "evaluate.neighbours": Key(20, "of k-NN", "[1, inf)", read_by=NEIGHBOURS),
    "evaluate.temperature": Key(0.07, "of k-NN's votes", "(0, inf)", read_by=NEIGHBOURS),
    "evaluate.knn_videos": Key(
        4096,
        "training videos that it looks among while training, at most",
        "[1, inf)",
        read_by=SELF_SUPERVISED,
    ),
    "probe.kind": Key("linear", "knn | linear | attentive", read_by=PROBES),
    "probe.epochs": Key(100, "of linear and attentive", "[1, inf)", read_by=PROBES),
    "probe.lr": Key(0.1, "per 256 clips", "(0, inf)", read_by=PROBES),
    "probe.batch_size": Key(1024, "clips; at most all", "[1, inf)", read_by=PROBES),
    "probe.num_heads": Key(0, "of attentive; 0: as the encoder", "[0, inf)", read_by=PROBES),
    "debug.overfit": Key(
        0,
        "learn this many videos by heart, without augmentation; must reach 100 %. 0: off",
        "[0, inf)",
        read_by=FINETUNED,
    ),
    "log.steps": Key(10, "steps from one logged step to the next", "[1, inf)", is_free=True),
    "log.profile": Key(
        "",
        'FIRST:LAST steps that a profile in WORKDIR/profile covers; "": none',
        read_by=TRAINED,
        is_free=True,
    ),
    "log.reference": Key(
        "",
        'log.jsonl of an earlier run (docs/reference has ours), to be drawn against; "": none',
        read_by=TRAINED,
        is_free=True,
    ),
    "log.pictures": Key(4, "held-out clips drawn at the end", "[1, inf)", read_by=PIXELS, is_free=True),
    "log.statistics": Key(
        "true",
        "of those pictures: true | visible | raw (pixel targets: raw only)",
        read_by=PIXELS,
        is_free=True,
    ),
}
