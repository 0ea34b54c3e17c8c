from pathlib import Path

import pytest
import torch
import yaml

from fedsim.config import ExperimentConfig, load_config, parse_config
from fedsim.errors import ConfigError
from fedsim.settings import merged, parse_overrides


def test_the_defaults_are_valid_and_survive_a_round_trip() -> None:
    config = ExperimentConfig()
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (
            ["defense.name=graddefence"],
            ["defense: unknown name 'graddefence'", "did you mean 'graddefense'", "pld"],
        ),
        (["data.name=imagenet"], ["data: unknown name 'imagenet'", "cifar10"]),
        (["attacks=[{name: dgl}]"], ["attacks.0: unknown name 'dgl'", "did you mean 'dlg'"]),
        (["fedaration.rounds=3"], ["unknown setting 'fedaration'", "did you mean 'federation'"]),
        (["defense={name: gc, prun: 0.5}"], ["defense: unknown setting 'prun'", "did you mean 'prune'"]),
        (["federation.rounds=many"], ["federation.rounds", "integer", "'many'"]),
        (["federation.clients=5"], ["federation", "clients_per_round is 10", "5 clients"]),
        (["federation.over_sampling=11"], ["federation", "over_sampling asks for 110", "there are 100"]),
        (["federation.dropout=1"], ["federation.dropout", "less than 1"]),
        (["runtime={precision: bfloat16, execution: fused}"], ["runtime", "bfloat16 needs execution: loop"]),
        (["runtime.execution=fused", "federation.local_steps=2"], ["runtime.execution", "one local step only"]),
        (
            ["federation.stragglers={name: gauss}"],
            ["federation.stragglers: unknown name", "exponential, lognormal"],
        ),
        (["defense={name: graddefense, perturbed: 11}"], ["defense", "11", "10"]),
        (["defense={name: dp_gaussian, sigma: -1}"], ["defense.sigma", "greater than or equal to 0", "-1"]),
        (
            ["data={name: digits, partition: {name: dirichlet, alpha: 0}}"],
            ["data.partition.alpha", "greater than 0"],
        ),
        (["audit.rounds=[101]", "attacks=[{name: dlg}]"], ["audit.rounds", "101", "100"]),
        (["audit.adversaries=[adaptive]", "attacks=[{name: dlg, published: true}]"], ["only the naive", "dlg"]),
        (["audit.adversaries=[clever]"], ["audit.adversaries.0", "'naive', 'adaptive' or 'oracle'"]),
        (["tracking.uri=3"], ["tracking.uri"]),
        (["attacks=[{name: dlg}, {name: dlg}]"], ["two share a label"]),
        (["runtime.workers=0"], ["runtime", "workers must be at least 1"]),
        (["federation.learning_rate=.nan"], ["federation.learning_rate", "finite"]),
        (["name=../evil"], ["name: letters, digits", "'../evil'"]),
        (["defense=gc"], ["defense: needs settings, as in {name: gc}"]),
        (["federation.stragglers=lognormal"], ["federation.stragglers: needs settings, as in {name: lognormal}"]),
        (["federation=x"], ["federation: needs settings, got 'x'"]),
        (["attacks=dlg"], ["attacks: needs a list, as in [dlg]"]),
        (["attacks=[dlg]"], ["attacks.0: needs settings, as in {name: dlg}"]),
        (["seed=-1"], ["seed", "greater than or equal to 0"]),
        (["defense"], ["key=value"]),
        (["=3"], ["key=value"]),
        (["seed=[1"], ["not valid YAML"]),
    ],
)
def test_wrong_settings_get_one_line_with_the_path(overrides: list[str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected settings"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_a_file_is_laid_over_the_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("federation: {rounds: 7}\ndefense: {name: gc, prune: 0.5}\n")
    config = load_config(path, ["defense.prune=0.6", "federation.clients=50"])
    assert (config.federation.rounds, config.federation.clients) == (7, 50)
    assert config.federation.clients_per_round == ExperimentConfig().federation.clients_per_round
    assert config.defense.model_dump()["prune"] == 0.6


def test_another_name_starts_a_mapping_afresh() -> None:
    base = {"defense": {"name": "graddefense", "sigma": 1.0}, "seed": 3}
    assert merged(base, {"defense": {"name": "gc"}}) == {"defense": {"name": "gc"}, "seed": 3}
    assert merged(base, {"defense": {"sigma": 2.0}})["defense"] == {"name": "graddefense", "sigma": 2.0}


def test_overrides_are_read_as_yaml() -> None:
    assert parse_overrides(["a.b=1e-3", "a.c=[1, 2]", "d=null"]) == {"a": {"b": "1e-3", "c": [1, 2]}, "d": None}
    assert parse_config(parse_overrides(["federation.learning_rate=1e-3"])).federation.learning_rate == 0.001


def test_the_fingerprint_tells_what_can_change_a_result() -> None:
    base = ExperimentConfig()
    assert base.fingerprint() == parse_config({"runtime": {"workers": 3}, "checkpoint_every": 7}).fingerprint()
    assert base.fingerprint() != parse_config({"runtime": {"clients_per_chunk": 3}}).fingerprint()
    assert base.fingerprint() != parse_config({"seed": 1}).fingerprint()


def test_a_chunk_is_never_wider_than_asked_and_does_not_depend_on_workers() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for workers in ("auto", 1, 8):
        config = parse_config({"runtime": {"workers": workers}})
        assert [config.chunk_width(n, cpu) for n in (1, 10, 100, 10_000)] == [1, 2, 13, 16]
        assert [config.chunk_width(n, gpu) for n in (1, 10, 100, 10_000)] == [1, 2, 13, 128]
    loop = parse_config({"runtime": {"execution": "loop"}})
    assert [loop.chunk_width(n, cpu) for n in (1, 10, 100, 10_000)] == [1, 2, 4, 16]
    assert [parse_config({}).shard_width(device) for device in (cpu, gpu)] == [4, 128]
    asked = parse_config({"runtime": {"clients_per_chunk": 30}})
    assert [asked.chunk_width(n, cpu) for n in (10, 100)] == [10, 30]
