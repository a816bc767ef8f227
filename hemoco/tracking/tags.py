"""Every tag that hemoco writes on runs and models in MLflow, and nowhere else is one spelt out.

Tags tell which run of MLflow is which. A run of hemoco is one parent run
(phase `parent`), one child for the pretraining (`pretrain`), one child for each transfer (`transfer`) and for each
transfer of an epoch's backbone (`curve`); a sweep is a run of phase `sweep` with one child for each trial (`trial`).
"""

from typing import Final


class Tag:
    """Names of tags."""

    # which run of MLflow it is
    RUN: Final = "hemoco.run"
    """Name of the run, as typed after `--run`; `SWEEP/TRIAL` for a trial of a sweep."""
    PHASE: Final = "hemoco.phase"
    """`parent`, `pretrain`, `transfer`, `curve`, `sweep` or `trial`."""
    TRANSFER: Final = "hemoco.transfer"
    """Name of the transfer in its recipe."""
    TRANSFER_KIND: Final = "hemoco.transfer_kind"
    """Kind of the transfer: `knn`, `linear_probe`, ..., as `hemoco.config.kinds` names it."""
    EPOCH: Final = "hemoco.epoch"
    """Epoch of the backbone that a run of phase `curve` measures."""
    SWEEP: Final = "hemoco.sweep"
    """Name of the sweep."""
    TRIAL: Final = "hemoco.trial"
    """Number of the trial in its sweep."""

    # how it was begun
    RECIPE: Final = "hemoco.recipe"
    """Name of the recipe."""
    RECIPE_FILE: Final = "hemoco.recipe_file"
    """Path of the recipe's file, where it was given by its path. To be shown, never to be run."""
    VERB: Final = "hemoco.verb"
    """Verb of the command line that began it."""
    COMMAND: Final = "hemoco.command"
    """Recipe and changed settings of the last command that worked at it, as JSON."""
    GIT_DIRTY: Final = "hemoco.git_dirty"
    """Whether the checkout had uncommitted changes: `true`, `false` or `unknown`."""
    COMMIT: Final = "hemoco.commit"
    """Commit of the code, in the metadata of a submitted job."""

    # what it works on and where its results are
    STORAGE: Final = "hemoco.storage"
    """URL of the run's folder."""
    DATA_DIGEST: Final = "hemoco.data_digest"
    """Digest of the shards of the pretraining."""
    TRANSFER_DATA_DIGEST: Final = "hemoco.transfer_data_digest"
    """Digest of the shards of the transfer."""
    BACKBONE_URL: Final = "hemoco.backbone_url"
    """URL of the backbone that a pretraining left or a transfer measures."""
    PRETRAIN_RUN_ID: Final = "hemoco.pretrain_run_id"
    """MLflow's id of the pretraining that the backbone is from."""
    METHOD: Final = "hemoco.method"
    """Method of the pretraining: `moco_v1`, `moco_v2` or `moco_v3`."""
    ARCHITECTURE: Final = "hemoco.architecture"
    """Architecture of a backbone, as timm names it."""
    METRIC: Final = "hemoco.metric"
    """Headline metric of a transfer or a sweep."""
    ERROR: Final = "hemoco.error"
    """Why it failed, in one line."""
    MODEL_ID: Final = "hemoco.model_id"
    """MLflow's id of the logged model that a registered version is of."""
    REGISTERED: Final = "hemoco.registered"

    # of a sweep's trials
    STOPPED: Final = "hemoco.stopped"
    """`true` where the trial was stopped early."""
    STEPS_PER_EPOCH: Final = "hemoco.steps_per_epoch"
    VERDICT: Final = "hemoco.verdict"
    """Why the trial was stopped early, or not."""

    # the machine of the last start
    HOST: Final = "hemoco.host"
    CPU: Final = "hemoco.cpu"
    CPUS: Final = "hemoco.cpus"
    GPU: Final = "hemoco.gpu"
    GPUS: Final = "hemoco.gpus"
    CUDA: Final = "hemoco.cuda"
    TORCH: Final = "hemoco.torch"
    PYTHON: Final = "hemoco.python"
    VERSION: Final = "hemoco.version"

    # followed by the name of a unit, INIT/seed_N, or of an init
    DONE_PREFIX: Final = "hemoco.done/"
    """`true` where the unit is recorded as done."""
    ATTEMPT_PREFIX: Final = "hemoco.attempt/"
    """Number of starts of the unit."""
    MODEL_PREFIX: Final = "hemoco.model/"
    """MLflow's id of the logged model that the init is."""
    BACKBONE_PREFIX: Final = "hemoco.backbone_"
    """`source` or `source_sha256` of an imported backbone."""
