"""The first screen of ``fit --help`` and of its relatives. ``--help all`` is the parser's own list of every setting."""

from __future__ import annotations

from collections.abc import Sequence

from lit_opd.shipped import program

ALL = "all"
_ASKS = ("-h", "--help")
HELP = """usage: {program} fit --config FILE [--config OVERLAY] [options]

run
  --config FILE                     a file, or a name of {program} configs
  --run_dir DIR                     run folder; default runs/NAME_OF_CONFIG
  --ckpt_path last                  go on where the run in that folder stopped
  --overwrite true                  replace the run in that folder
models and data
  --model.student.path PATH         folder or hub id; what is trained
  --model.teacher.path PATH         folder or hub id; who scores
  --data.train FILE                 JSON lines, Parquet, or a hub data set
  --data.val FILE                   held-out prompts
  --data.max_prompt_tokens N        default 2048
  --model.sampler.max_new_tokens N  the longest response
  --model.sampler.temperature X     of sampling and scoring
what is learned
  --model.weighting CLASS           Uniform, LinearDecay, my_file.MyWeighting
  --model.weighting.w_max X         a setting of the class, as all after it
  --model.objective CLASS           PolicyLoss or Divergence
  --model.aggregation NAME          default sequence-mean; token-mean, ...
steps
  --trainer.max_steps N             optimizer steps; default 100
  --data.prompt_batch N             prompts a step, over all ranks; default 128
  --data.samples_per_prompt N       default 1
  --model.optimizer CLASS           AdamW, ...
  --model.optimizer.lr X            of that optimizer
  --model.token_budget N            tokens a micro-batch; default null: no cut
  --trainer.val_check_interval N    batches between validations; default 10
  --checkpoint_every N              default 50
machine
  --trainer.devices N               processes, a GPU each
  --trainer.strategy NAME           ddp, ModelParallelStrategy (FSDP2); see docs
  --trainer.precision NAME          bf16-mixed, 32-true, ...
  --seed_everything N               default 42

every setting:        {program} fit --help all
those of a class:     {program} fit --model.weighting.help LinearDecay
check, train nothing: {program} preflight --config FILE
"""
PREFLIGHT = """usage: {program} preflight --config FILE [--config OVERLAY] [options]

Checks a config as fit would, and estimates the memory of a rank. It trains and
writes nothing; the exit status is 2 where a check is an error.

  --config FILE      as for fit, with the same overrides
  --memory_gb X      GiB a rank has; default this machine's
  --deep true        load the models and try a few prompts; default: small
                     ones in local folders, for a run on CPUs

settings:            {program} fit --help
every setting:       {program} preflight --help all
"""
MEASURING = """usage: {program} {command} --config FILE [options]

{what}

  --config FILE               that of the run: RUN/config.yaml
  --ckpt_path FILE            a checkpoint of it: RUN/checkpoints/last.ckpt
  --model.student.path DIR    or an exported student, without --ckpt_path
  --data.val FILE             other prompts
  --run_dir DIR               folder of the result

settings:        {program} fit --help
every setting:   {program} {command} --help all
"""
WHAT = {
    "validate": "Measures a student on the validation prompts, as fit does while it trains.",
    "test": "Measures a student once more, and keeps the result beside that of validate.",
    "predict": "Samples an answer to every validation prompt and writes it with the log-probs\nand the weight of each token.",
}


def first_screen(words: Sequence[str]) -> str | None:
    """The short help where a command line asks for it, else None.

    Args:
        words: of the command line, the command included.
    """
    if not any(word in _ASKS for word in words) or words[-1] == ALL:
        return None
    if words[0] in WHAT:
        return MEASURING.format(program=program(), command=words[0], what=WHAT[words[0]])
    screens = {"fit": HELP, "preflight": PREFLIGHT}
    return screens[words[0]].format(program=program()) if words[0] in screens else None


def without_all(words: Sequence[str]) -> list[str]:
    """``--help all`` as the parser knows it; other words as they are."""
    asks = len(words) >= 2 and words[-1] == ALL and words[-2] in _ASKS
    return list(words[:-1] if asks else words)
