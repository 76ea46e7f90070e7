"""What a wheel brings: a command, configs, callbacks inside the package and nothing beside it; and the start of the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_opd import __main__ as command
from lit_opd import shipped
from lit_opd.cli import configs
from lit_opd.cli.command import COMMANDS, OPDCLI
from lit_opd.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
LONGEST_LINE = 80
HEAVY = ("torch", "lightning", "transformers")
ONE_STEP = ["--trainer.max_steps", "1", "--data.prompt_batch", "8", "--data.val_limit", "4", "--wandb.mode", "disabled"]
ONE_STEP += ["--model.sampler.max_new_tokens", "8", "--model.validation.samples", "1"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built here, unpacked as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist")]
    subprocess.run(build, check=True, cwd=folder, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": str(LONGEST_LINE)}


def test_a_wheel_brings_the_package_alone_with_callbacks_and_configs_inside(installed):
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin"}
    assert tops == {"lit_opd"}
    inside = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*") if path.is_file()}
    found = (path.relative_to(installed / "lit_opd/configs") for path in (installed / "lit_opd/configs").rglob("*"))
    assert {path.as_posix() for path in found if path.suffix} == inside
    modules = {path.name for path in (ROOT / "callbacks").glob("*.py")}
    assert {path.name for path in (installed / "lit_opd/callbacks").glob("*.py")} == modules
    assert (installed / "lit_opd/testbed/assets/student/model.safetensors").is_file()
    assert (installed / "lit_opd/py.typed").is_file() and (installed / "bin/lit-opd").is_file()
    (info,) = installed.glob("*.dist-info")
    assert list(info.rglob("LICENSE"))


def test_an_installation_trains_from_another_folder_beside_a_file_named_callbacks(installed, tmp_path):
    (tmp_path / "callbacks.py").write_text("MINE = 1\n")
    (tmp_path / "mine.py").write_text(
        "import callbacks\nimport lit_opd.callbacks\nfrom lit_opd import Uniform\n"
        "assert callbacks.MINE and 'site' in lit_opd.callbacks.__file__\n\n\nclass Mine(Uniform):\n    pass\n"
    )
    words = ["-m", "lit_opd", "fit", "--config", "quickstart", "--model.weighting", "mine.Mine", "--run_dir", "run"]
    done = subprocess.run(
        [sys.executable, *words, *ONE_STEP], cwd=tmp_path, env=environment(installed), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/summary.json").read_text())["strategy"] == "Mine"
    assert "lit-opd fit --config run/config.yaml" in done.stdout + done.stderr


def test_both_names_of_the_callbacks_are_one_class_whichever_comes_first():
    names = ("callbacks", "lit_opd.callbacks")
    code = (
        "import os, lit_opd.cli.command\n"  # all that is heavy, once for both orders
        "import sys; assert not [name for name in sys.modules if name.split('.')[0] == 'callbacks']\n"
        f"first, second = {names} if os.fork() else {names[::-1]}\n"
        "exec(f'import {first}.export as a, {second}.export as b, {first} as c, {second} as d')\n"
        "assert a is b and c is d\n"
        "try:\n    assert os.wait()[1] == 0\n"
        "except ChildProcessError:\n    pass\n"  # the child has none
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(ROOT), check=True)


def test_help_version_and_configs_load_nothing_heavy():
    code = (
        "import sys; from lit_opd.__main__ import main; import lit_opd.sweep.command; main({}); "
        f"assert not [name for name in {HEAVY} if name in sys.modules], 'heavy'"
    )
    for words in (["--help"], ["fit", "--help"], ["--version"], ["configs"]):
        subprocess.run(
            [sys.executable, "-c", code.format(words)], env=environment(ROOT), check=True, capture_output=True
        )


def test_public_names_are_what_they_say_and_a_wrong_one_is_one_line():
    import lit_opd

    for name in lit_opd.__all__:
        assert getattr(lit_opd, name) is not None
    assert lit_opd.OPDModule.__name__ == "OPDModule" and "OPDModule" in dir(lit_opd)
    with pytest.raises(AttributeError, match="lit_opd has no 'OPDModul'; it has AdvantageTransform, "):
        _ = lit_opd.OPDModul


@pytest.mark.parametrize("words", [[], ["--help"], ["fit", "--help"], ["configs"], ["--version"]], ids=str)
def test_what_is_printed_fits_80_columns(words, capsys):
    command.main(words)
    said = capsys.readouterr().out
    assert said and max(map(len, said.splitlines())) <= LONGEST_LINE


def test_the_help_names_every_command_of_the_command_line():
    named = {
        "fit",
        "preflight",
        "validate",
        "test",
        "predict",
        "compare",
        "export",
        "push",
        "chat",
        "configs",
        "new",
        "sweep",
        "report",
    }
    assert named == {*OPDCLI.subcommands(), *COMMANDS, command.SWEEP, *command.LIGHT}
    listed = {line.split()[0] for line in command.HELP.splitlines() if line.startswith("  ")}
    assert listed == named


def test_a_config_names_a_class_by_the_path_it_always_had():
    from jsonargparse._util import get_import_path

    import lit_opd

    for name in ("Uniform", "LocalTeacher", "DecodeSampler", "PolicyLoss"):
        path = get_import_path(getattr(lit_opd, name))
        assert path is not None and path.count(".") == 2 and path != f"lit_opd.{name}", path


# -- configs by name -----------------------------------------------------------------------------------------------------


def test_a_config_is_found_by_its_name_unless_a_file_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(ROOT / "configs/quickstart.yaml")
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert shipped.with_config_files(["fit", "--config", name]) == ["fit", "--config", own]
    assert shipped.with_config_files(["fit", "--config=weighting/uniform"])[1].endswith(
        "configs/weighting/uniform.yaml"
    )
    assert shipped.with_config_files(["fit", "--config", "nothing"]) == ["fit", "--config", "nothing"]
    assert shipped.with_config_files(["fit", "--config"]) == ["fit", "--config"]
    (tmp_path / "quickstart").write_text("seed_everything: 1")
    assert shipped.with_config_files(["--config", "quickstart"]) == ["--config", "quickstart"]


def test_the_list_tells_what_runs_by_itself_from_what_is_laid_over_it(capsys):
    """A config with a model of its own runs by itself; the list fits 80 columns and cuts no sentence."""
    configs.run([])
    out = capsys.readouterr().out
    listed = set(re.findall(r"^  (\S+)$", out.split("laid over")[0], flags=re.M))
    whole = {
        name
        for name in shipped.config_names()
        if "student" in yaml.safe_load(shipped.config_file(name).read_text()).get("model", {})
    }
    assert listed == whole and "recipes/opsd" in whole and "weighting/uniform" not in whole
    assert max(map(len, out.splitlines())) <= 80
    assert "The embedded task on two cores" in out


def test_a_file_of_the_package_is_shown_as_such():
    inside = str(shipped.PACKAGE / "testbed/assets/train.jsonl")
    assert shipped.shown_path(inside) == "lit_opd/testbed/assets/train.jsonl"
    assert shipped.shown_path("data/train.jsonl") == "data/train.jsonl" and shipped.shown_path("org/name") == "org/name"


def test_a_path_into_the_package_is_the_package_s_own_unless_it_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(ROOT / "lit_opd/testbed/assets/student")
    given = {
        "a": "lit_opd/testbed/assets/student",
        "b": ["lit_opd/nothing", {"c": "lit_opd/testbed/assets/student"}],
        "d": 3,
    }
    assert shipped.with_shipped_paths(given) == {"a": own, "b": ["lit_opd/nothing", {"c": own}], "d": 3}
    (tmp_path / "lit_opd/testbed/assets/student").mkdir(parents=True)
    assert shipped.shipped_path("lit_opd/testbed/assets/student") == "lit_opd/testbed/assets/student"


def test_a_config_is_copied_once_and_never_over_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs.run(["weighting/uniform"])
    assert Path("uniform.yaml").read_bytes() == (ROOT / "configs/weighting/uniform.yaml").read_bytes()
    configs.run(["quickstart", "mine.yaml"])
    assert "fit --config mine.yaml" in capsys.readouterr().out
    with pytest.raises(InputError, match="must have a new file to write, got uniform.yaml"):
        configs.run(["weighting/uniform"])
    with pytest.raises(InputError, match="must be given one of .*quickstart.*, got nothing"):
        configs.run(["nothing"])


# -- a study of one's own ------------------------------------------------------------------------------------------------


def test_a_new_study_trains_and_passes_its_own_test(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.main(["new", "my_study"])
    assert "cd my_study" in capsys.readouterr().out
    study = tmp_path / "my_study"
    assert {path.name for path in study.iterdir()} == {
        "my_weighting.py",
        "test_my_weighting.py",
        "config.yaml",
        "README.md",
    }
    monkeypatch.chdir(study)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command.main(["fit", "--config", "config.yaml", *ONE_STEP])
    assert json.loads((study / "runs/my_weighting/summary.json").read_text())["strategy"] == "MyWeighting"
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(study), str(study)]) == 0
    sys.modules.pop("my_weighting", None)  # another test's may have its name


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit) as ended:
        command.main(["new", "mine"])
    assert ended.value.code == 2 and "must be given a folder that is not there yet, got mine" in capsys.readouterr().err
    assert not list((tmp_path / "mine").iterdir())
