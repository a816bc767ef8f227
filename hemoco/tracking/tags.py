"""Names of all tags that hemoco writes on runs and models in MLflow; no other module spells one.

Tags identify the runs. A run of hemoco is, in MLflow, one parent run (phase `parent`), one child
for the pretraining (`pretrain`), one child for each transfer (`transfer`), and one for each
transfer of an epoch's backbone (`curve`). A sweep is a run of phase `sweep` with one child for each
trial (`trial`).
"""

from typing import Final


class Tag:
    """Names of tags, with the meaning of their values."""

    # identity
    RUN: Final = "hemoco.run"
    """Name of the run, as after `--run`; `SWEEP/TRIAL` for a trial of a sweep."""
    PHASE: Final = "hemoco.phase"
    """`parent`, `pretrain`, `transfer`, `curve`, `sweep` or `trial`."""
    TRANSFER: Final = "hemoco.transfer"
    """Name of the transfer in its recipe."""
    TRANSFER_KIND: Final = "hemoco.transfer_kind"
    """Kind of the transfer, from `hemoco.config.kinds`: `knn`, `linear_probe`, ..."""
    EPOCH: Final = "hemoco.epoch"
    """Epoch of the backbone that a run of phase `curve` measures."""
    SWEEP: Final = "hemoco.sweep"
    """Name of the sweep."""
    TRIAL: Final = "hemoco.trial"
    """Number of the trial in its sweep."""

    # start
    RECIPE: Final = "hemoco.recipe"
    """Name of the recipe."""
    RECIPE_FILE: Final = "hemoco.recipe_file"
    """Path of the recipe's file, if it was given by its path; for display, never to be run."""
    VERB: Final = "hemoco.verb"
    """Verb of the command line that started the run."""
    COMMAND: Final = "hemoco.command"
    """Recipe and changed settings of the last command for this run, as JSON."""
    GIT_DIRTY: Final = "hemoco.git_dirty"
    """`true` if the checkout had uncommitted changes, `false` if not, or `unknown`."""
    COMMIT: Final = "hemoco.commit"
    """Commit of the code, in the metadata of a submitted job."""

    # inputs and outputs
    TRANSFERS: Final = "hemoco.transfers"
    """Names of the recipe's transfers as a JSON list, in the recipe's order: results keep it."""
    STORAGE: Final = "hemoco.storage"
    """URL of the run's folder."""
    DATA_DIGEST: Final = "hemoco.data_digest"
    """Digest of the shards of the pretraining."""
    TRANSFER_DATA_DIGEST: Final = "hemoco.transfer_data_digest"
    """Digest of the shards of the transfer."""
    BACKBONE_URL: Final = "hemoco.backbone_url"
    """URL of the backbone that a pretraining exported or a transfer measures."""
    PRETRAIN_RUN_ID: Final = "hemoco.pretrain_run_id"
    """MLflow's id of the pretraining run that the backbone is from."""
    METHOD: Final = "hemoco.method"
    """Method of the pretraining: `moco_v1`, `moco_v2` or `moco_v3`."""
    ARCHITECTURE: Final = "hemoco.architecture"
    """Architecture of a backbone, as timm names it."""
    METRIC: Final = "hemoco.metric"
    """Headline metric of a transfer or a sweep."""
    ERROR: Final = "hemoco.error"
    """Reason of the failure, in one line."""
    MODEL_ID: Final = "hemoco.model_id"
    """MLflow's id of the logged model that a registered version belongs to."""
    REGISTERED: Final = "hemoco.registered"
    """`NAME/VERSION` under which a logged model was registered."""

    # trials of a sweep
    STOPPED: Final = "hemoco.stopped"
    """`true` if the trial was stopped early."""
    STEPS_PER_EPOCH: Final = "hemoco.steps_per_epoch"
    """Optimiser steps in an epoch of the trial."""
    VERDICT: Final = "hemoco.verdict"
    """Reason why the trial was stopped early, or continued."""

    # machine and versions of the last start
    HOST: Final = "hemoco.host"
    """Name of the machine."""
    CPU: Final = "hemoco.cpu"
    """Model of the CPU."""
    CPUS: Final = "hemoco.cpus"
    """Number of logical cores."""
    GPU: Final = "hemoco.gpu"
    """Model of the first GPU."""
    GPUS: Final = "hemoco.gpus"
    """Number of GPUs that the process may use."""
    CUDA: Final = "hemoco.cuda"
    """Version of CUDA."""
    TORCH: Final = "hemoco.torch"
    """Version of torch."""
    PYTHON: Final = "hemoco.python"
    """Version of Python."""
    VERSION: Final = "hemoco.version"
    """Version of hemoco."""

    # prefixes, followed by the name of a unit, INIT/seed_N, or of an init
    DONE_PREFIX: Final = "hemoco.done/"
    """`true` if the unit is done and recorded."""
    ATTEMPT_PREFIX: Final = "hemoco.attempt/"
    """Number of starts of the unit."""
    MODEL_PREFIX: Final = "hemoco.model/"
    """MLflow's id of the init's logged model."""
    BACKBONE_PREFIX: Final = "hemoco.backbone_"
    """`source` or `source_sha256` of an imported backbone."""
