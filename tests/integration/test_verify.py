"""`gisp verify` on a finished run: clean as it is, and every tampering found; forgers re-seal what they change."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gisp_tasks.audit.findings import Finding
from gisp_tasks.audit.verify import AuditReport, Wanted, verify
from gisp_tasks.refs import canonical_json, sha256_bytes
from gisp_tasks.stores.manifest import seal
from gisp_tasks.stores.manifest_schema import SCHEMA_FILE, Manifest, json_schema
from gisp_tasks.stores.registry import MANIFEST_TAG, MlflowRegistry

Json = dict[str, Any]
CHECKPOINT = "levels/sp40/model/model.safetensors"
ORDER = "removal_order.safetensors"


@dataclass(frozen=True)
class Signed:
    """A finished, signed run with two steps and two levels in a directory, and MLflow on a database file.

    Args:
        prefix: of the run.
        mlflow: the database file.
        public_key: of the signer.
        stranger: private key of somebody else.
        recipe: its file.
    """

    prefix: Path
    mlflow: Path
    public_key: Path
    stranger: Path
    recipe: Path


def _key_pair(directory: Path, name: str) -> tuple[Path, Path]:
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def signed(gisp: Any, tmp_path_factory: pytest.TempPathFactory, testdata: Path) -> Signed:
    directory = tmp_path_factory.mktemp("signed")
    private, public = _key_pair(directory, "signer")
    recipe, mlflow = directory / "recipe.yaml", directory / "mlflow.db"
    value = {
        "name": "audited",
        "model": {"source": str(testdata / "models" / "stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "embedded", "sequences": 8, "sequence_length": 64},
        "pruning": {"levels": [0.2, 0.4], "steps": 2},
        "evaluation": {"embedded_text": {"windows": [128], "limit_tokens": 1025}},
        "publish": {
            "store": f"file://{directory}/store",
            "mlflow": {"tracking_uri": f"sqlite:///{mlflow}", "model_name": "audited-gisp"},
            "gate": {"max_perplexity_ratio": 50.0},
            "signing": {"private_key_env": "SIGNER_KEY"},
        },
    }
    recipe.write_text(yaml.safe_dump(value))
    environment = {"SIGNER_KEY": private.read_text(), "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-environment"}
    printed = gisp.start_inline("run", str(recipe), "--json", environment=environment).stdout
    prefix = Path(json.loads(printed)["store"].removeprefix("file://"))
    return Signed(prefix, mlflow, public, _key_pair(directory, "stranger")[0], recipe)


@dataclass(frozen=True)
class Copy:
    """A copy of the run, to be tampered with."""

    prefix: Path
    public_key: Path

    def verify(self, **wanted: Any) -> AuditReport:
        return verify(self.prefix.as_uri(), Wanted(**{"registry": False, **wanted}))

    def flip_byte(self, key: str, offset: int = -1) -> None:
        data = bytearray((self.prefix / key).read_bytes())
        data[offset] ^= 1
        (self.prefix / key).write_bytes(data)

    def read(self, key: str = "manifest.json") -> Json:
        return json.loads((self.prefix / key).read_text())

    def write(self, key: str, value: Json) -> None:
        (self.prefix / key).write_bytes(canonical_json(value))

    def forge(self, change: Callable[[Json], None]) -> None:
        """Change the manifest as somebody who knows its form: artefacts as they are now, both digests anew."""
        manifest = self.read()
        change(manifest)
        for key, entry in manifest["artifacts"].items():
            if (self.prefix / key).exists():
                data = (self.prefix / key).read_bytes()
                entry |= {"sha256": sha256_bytes(data), "size": len(data)}
        content = {k: v for k, v in manifest.items() if k not in {"format_version", "sha256", "document_sha256"}}
        trigger = content.pop("trigger")
        (self.prefix / "manifest.json").write_bytes(seal(content, trigger))


@pytest.fixture
def copy(signed: Signed, tmp_path: Path) -> Copy:
    prefix = shutil.copytree(signed.prefix, tmp_path / "runs" / signed.prefix.name)
    return Copy(prefix, signed.public_key)


def places(report: AuditReport) -> set[tuple[str, str]]:
    return {(finding.check, finding.where) for finding in report.audit.findings}


def messages(report: AuditReport, check: str) -> str:
    return "\n".join(str(finding) for finding in report.audit.findings if finding.check == check)


# As it is


def test_a_finished_run_is_clean_and_replays(gisp: Any, signed: Signed) -> None:
    """The whole of it as a user calls it: a process of its own for the steps, registry, signatures."""
    options = ("--replay", "--public-key", str(signed.public_key), "--tracking-uri", f"sqlite:///{signed.mlflow}")
    printed = gisp.start_inline("verify", str(signed.prefix / "manifest.json"), *options, "--json").stdout
    report = json.loads(printed)
    assert report["findings"] == []
    assert report["clean"] is True
    assert report["notes"] == ["replay: all 2 steps gave the recorded removal order, bit by bit"]
    manifest = json.loads((signed.prefix / "manifest.json").read_text())
    listed = sum(len(json.loads((signed.prefix / f"levels/{n}/model.json").read_text())) for n in ("sp20", "sp40"))
    assert report["objects"] == len(manifest["artifacts"]) + listed
    unread = {"manifest.json", "manifest.sig", "report.html"}
    files = [path for path in signed.prefix.rglob("*") if path.is_file() and path.name not in unread]
    read = [path for path in files if path.name not in {"timing.json", "model.sig"}]
    assert report["objects"] == len(read)
    assert report["bytes"] == sum(path.stat().st_size for path in read)


def test_what_was_not_checked_is_said(copy: Copy) -> None:
    report = copy.verify(registry=True)
    assert report.clean
    assert sorted(note.partition(" not ")[0] for note in report.audit.notes) == [
        "signatures were",
        "the registry was",
    ]
    elsewhere = copy.verify(registry=True, tracking_uri="sqlite:////nowhere/at/all.db")
    assert elsewhere.clean
    assert any("there is no such file" in note for note in elsewhere.audit.notes)
    assert not Path("/nowhere").exists()


def test_the_shipped_schema_is_that_of_the_models_and_holds(signed: Signed) -> None:
    assert SCHEMA_FILE.read_bytes() == json_schema(), "write it anew: see the head of manifest_schema.py"
    schema = json.loads(SCHEMA_FILE.read_text())
    manifest = json.loads((signed.prefix / "manifest.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    assert list(validator.iter_errors(manifest)) == []
    Manifest.model_validate(manifest)
    for change in ({"format_version": 1}, {"run_id": "x"}, {"surprise": 1}, {"steps": [{}]}, {"levels": []}):
        assert list(validator.iter_errors(manifest | change)), change


def test_the_manifest_says_who_how_and_on_what_and_no_secret(signed: Signed) -> None:
    text = (signed.prefix / "manifest.json").read_text()
    manifest = json.loads(text)
    trigger = manifest["trigger"]
    assert (trigger["by"], trigger["dag_id"], trigger["run_type"]) == ("command line", "gisp_audited", "manual")
    assert trigger["dag_run_id"].startswith("manual__")
    assert trigger["user"] != "dag_test"
    (computed,) = manifest["computed_on"]
    assert computed["steps"] == [1, 2]
    assert (computed["deterministic_algorithms"], computed["tf32"], computed["seed"]) == (True, False, 0)
    assert computed["threads"] == 1
    assert manifest["tokenizer"]["files"].keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert manifest["datasets"]["evaluation"]["embedded_text"]["dataset"] == "embedded"
    assert sum(step["removed"] for step in manifest["steps"]) > 0
    for secret in ("PRIVATE KEY", "a-secret-of-the-environment", "SIGNER_KEY", str(signed.mlflow), "file://"):
        assert secret not in text


# Tampered with


@pytest.mark.parametrize("key", [CHECKPOINT, ORDER, "steps/0001/scores.safetensors", "levels/sp20/MLmodel"])
def test_one_flipped_byte(copy: Copy, key: str) -> None:
    copy.flip_byte(key)
    report = copy.verify()
    assert ("objects", key) in places(report)
    assert "and the record says" in messages(report, "objects")
    assert {where for check, where in places(report) if check == "objects"} == {key}


def test_a_flipped_byte_of_the_manifest(copy: Copy) -> None:
    data = (copy.prefix / "manifest.json").read_bytes()
    place = data.index(b'"num_tokens": ') + len(b'"num_tokens": ')
    copy.flip_byte("manifest.json", place)
    found = messages(copy.verify(), "manifest")
    assert "document_sha256" in found
    assert "it was changed" in found


def test_a_manifest_that_is_none(copy: Copy) -> None:
    copy.flip_byte("manifest.json", 0)
    report = copy.verify()
    assert places(report) == {("manifest", "manifest.json")}
    (copy.prefix / "manifest.json").unlink()
    assert "is gone" in messages(copy.verify(), "manifest")


def test_deleted_objects(copy: Copy) -> None:
    deleted = ("plan.json", "levels/sp20/reload.json", CHECKPOINT, "steps/0002/removal_order.safetensors")
    for key in deleted:
        (copy.prefix / key).unlink()
    report = copy.verify()
    # Never stops at the first: all of them, and each with its own line.
    assert {where for check, where in places(report) if check == "objects"} == set(deleted)


def test_an_object_that_does_not_belong(copy: Copy) -> None:
    planted = ("levels/sp20/model/pytorch_model.bin", "levels/sp20/model/.gitignore", "notes.txt")
    for key in planted:
        (copy.prefix / key).write_bytes(b"planted")
    report = copy.verify(public_key=copy.public_key)
    assert {where for check, where in places(report) if check == "objects"} == set(planted)


def test_a_changed_metric(copy: Copy) -> None:
    metric = "embedded_text_ppl_token_w128"

    def better(manifest: Json) -> None:
        manifest["levels"][2]["evaluation"]["metrics"][metric] = 1.25

    copy.forge(better)
    report = copy.verify()
    found = messages(report, "levels")
    assert f"{metric} (metrics) is" in found
    assert "and the record says 1.25" in found
    assert ("levels", "levels/sp40/level.json") in places(report)
    assert "the gate" in found


def _halve_a_width(manifest: Json) -> None:
    manifest["levels"][1]["channels"][0] //= 2


def _swap_keep_sets(manifest: Json) -> None:
    one, other = manifest["levels"][1:]
    one["keep_set_sha256"], other["keep_set_sha256"] = other["keep_set_sha256"], one["keep_set_sha256"]


def _fewer_parameters(manifest: Json) -> None:
    manifest["levels"][2]["parameters"] -= 1


def _another_proof(manifest: Json) -> None:
    manifest["levels"][1]["reload"] |= {"max_logit_difference": 0.5, "tolerance": 1.0}


def _another_revision(manifest: Json) -> None:
    manifest["model"]["revision"] = "0" * 40


def _fewer_removals(manifest: Json) -> None:
    manifest["steps"][1]["removed"] -= 1


def _another_seed(manifest: Json) -> None:
    manifest["recipe"]["calibration"]["seed"] = 7


def _an_artifact_less(manifest: Json) -> None:
    del manifest["artifacts"]["steps/0001/scores.safetensors"]


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (_halve_a_width, "levels", "per_layer_config"),
        (_swap_keep_sets, "levels", "keep_set_sha256 is"),
        (_fewer_parameters, "levels", "the number of parameters in its tensors is"),
        (_another_proof, "levels", "logits differ by 0.5, allowed is 0.0002"),
        (_another_revision, "record", "the model"),
        (_fewer_removals, "order", "the number of removals is"),
        (_another_seed, "record", "the recipe is"),
        (_an_artifact_less, "objects", "the manifest's artifacts do not name it"),
    ],
)
def test_a_forged_record_contradicts_itself(
    copy: Copy, change: Callable[[Json], None], check: str, message: str
) -> None:
    copy.forge(change)
    report = copy.verify(public_key=copy.public_key)
    assert message in messages(report, check)
    assert ("signatures", "manifest.sig") in places(report)
    assert not messages(report, "manifest")


def test_another_manifest_of_the_same_run_is_told_by_signature_and_registry(signed: Signed, copy: Copy) -> None:
    """Nothing in the store contradicts who triggered it: what lies elsewhere does."""

    def somebody_else(manifest: Json) -> None:
        manifest["trigger"]["user"] = "somebody-else"

    copy.forge(somebody_else)
    assert copy.verify().clean
    report = copy.verify(public_key=copy.public_key)
    assert places(report) == {("signatures", "manifest.sig")}
    assert "Hash mismatch" in messages(report, "signatures")
    report = copy.verify(registry=True, tracking_uri=f"sqlite:///{signed.mlflow}")
    assert "the manifest's digest there is" in messages(report, "registry")


def test_an_order_that_no_scores_support(copy: Copy) -> None:
    """Two removals of the last step change places everywhere, digests included: the scores tell."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    for key in (ORDER, "steps/0002/removal_order.safetensors"):
        with safe_open(copy.prefix / key, framework="numpy") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rank = tensors["mlp.rank"]
        last = [tuple(np.argwhere(rank == value)[0]) for value in np.sort(rank[rank >= 0])[-2:]]
        rank[last[0]], rank[last[1]] = rank[last[1]], rank[last[0]]
        save_file(tensors, copy.prefix / key, metadata=metadata)
    digest = sha256_bytes((copy.prefix / ORDER).read_bytes())

    def everywhere(manifest: Json) -> None:
        manifest["removal_order"]["sha256"] = manifest["steps"][1]["removal_order_sha256"] = digest

    copy.forge(everywhere)
    report = copy.verify()
    assert ("order", "steps/0002/removal_order.safetensors") in places(report)
    assert "does not follow from the step's scores: removal" in messages(report, "order")
    assert not messages(report, "objects")


def test_a_checkpoint_of_other_shapes(copy: Copy) -> None:
    """Same bytes of weights, another shape in the header, listing and record forged along."""
    path = copy.prefix / CHECKPOINT
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = "model.layers.0.mlp.down_proj.weight"
    header[name]["shape"].reverse()
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])
    listing = copy.read("levels/sp40/model.json")
    listing["model.safetensors"]["sha256"] = sha256_bytes(path.read_bytes())
    copy.write("levels/sp40/model.json", listing)
    digest = sha256_bytes((copy.prefix / "levels/sp40/model.json").read_bytes())
    record = copy.read("levels/sp40/level.json")
    record["model"]["sha256"] = digest
    copy.write("levels/sp40/level.json", record)

    def along(manifest: Json) -> None:
        manifest["levels"][2]["model"]["sha256"] = digest

    copy.forge(along)
    report = copy.verify(public_key=copy.public_key)
    assert f"the shape of {name} is" in messages(report, "levels")
    assert places(report) == {
        ("levels", "levels/sp40/model"),
        ("signatures", "manifest.sig"),
        ("signatures", "levels/sp40/model.sig"),
    }


def test_listings_cannot_lead_out_of_the_run(copy: Copy, tmp_path: Path) -> None:
    listing = copy.read("levels/sp20/model.json")
    listing["../../../../../escaped/config.json"] = listing["config.json"]
    copy.write("levels/sp20/model.json", listing)
    report = copy.verify()
    assert any("escaped" in where for _, where in places(report))
    assert not list(tmp_path.rglob("escaped"))


# Signatures


def _missing(prefix: Path, stranger: Path) -> None:
    (prefix / "levels/sp20/model.sig").unlink()


def _of_another_level(prefix: Path, stranger: Path) -> None:
    shutil.copy(prefix / "levels/sp40/model.sig", prefix / "levels/sp20/model.sig")


def _of_another_key(prefix: Path, stranger: Path) -> None:
    from gisp_tasks.recipe import SigningSection
    from gisp_tasks.stores.signatures import sign

    signature = prefix / "levels/sp20/model.sig"
    sign(prefix / "levels/sp20/model", signature, SigningSection(private_key_path=str(stranger)))


def _forged(prefix: Path, stranger: Path) -> None:
    """The stranger's signature under the signer's name."""
    signature = prefix / "levels/sp20/model.sig"
    hint = json.loads(signature.read_text())["verificationMaterial"]
    _of_another_key(prefix, stranger)
    forged = json.loads(signature.read_text()) | {"verificationMaterial": hint}
    signature.write_text(json.dumps(forged))


def _nonsense(prefix: Path, stranger: Path) -> None:
    (prefix / "levels/sp20/model.sig").write_text("no signature")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing, "there is no signature"),
        (_of_another_level, "mismatch"),
        (_of_another_key, "Key mismatch"),
        (_forged, "InvalidSignature"),
        (_nonsense, "the signature does not hold"),
    ],
)
def test_signatures(signed: Signed, copy: Copy, change: Callable[[Path, Path], None], message: str) -> None:
    change(copy.prefix, signed.stranger)
    report = copy.verify(public_key=copy.public_key)
    assert places(report) == {("signatures", "levels/sp20/model.sig")}
    assert message in messages(report, "signatures")


# The registry


@pytest.fixture
def registry(signed: Signed, tmp_path: Path) -> str:
    """A copy of the database, to be tampered with; its versions point to the run itself."""
    return f"sqlite:///{shutil.copy(signed.mlflow, tmp_path / 'mlflow.db')}"


def _registry_findings(signed: Signed, registry: str) -> list[Finding]:
    report = verify(signed.prefix.as_uri(), Wanted(tracking_uri=registry))
    assert {finding.check for finding in report.audit.findings} <= {"registry"}
    return report.audit.findings


def _client(registry: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(registry, registry)


def _number(registry: str, level: str) -> int:
    versions = MlflowRegistry(registry).versions("audited-gisp")
    return next(version.version for version in versions if version.tags["gisp.level"] == level)


def test_a_repointed_alias(signed: Signed, registry: str) -> None:
    _client(registry).set_registered_model_alias("audited-gisp", "sp20", str(_number(registry, "sp40")))
    (finding,) = _registry_findings(signed, registry)
    assert finding.where == "audited-gisp@sp20"
    assert f"points to version {_number(registry, 'sp40')} " in finding.message


def test_a_champion_that_nobody_decided_on(signed: Signed, registry: str) -> None:
    _client(registry).set_registered_model_alias("audited-gisp", "champion-sp20", str(_number(registry, "sp20")))
    (finding,) = _registry_findings(signed, registry)
    assert finding.where == "audited-gisp@champion-sp20"
    assert "moved by other means" in finding.message


def test_a_removed_alias(signed: Signed, registry: str) -> None:
    _client(registry).delete_registered_model_alias("audited-gisp", "sp40")
    (finding,) = _registry_findings(signed, registry)
    assert "nothing has its alias" in finding.message


@pytest.mark.parametrize(("gate", "expected"), [("passed", 0), ("failed", 1)])
def test_a_later_run_may_take_the_alias_if_it_passed(signed: Signed, registry: str, gate: str, expected: int) -> None:
    tags = {"gisp.run_id": "f" * 12, "gisp.level": "sp20", "gate": gate}
    version = _client(registry).create_model_version("audited-gisp", "file:///other/levels/sp20", tags=tags)
    _client(registry).set_registered_model_alias("audited-gisp", "sp20", version.version)
    report = verify(signed.prefix.as_uri(), Wanted(tracking_uri=registry))
    assert len(report.audit.findings) == expected
    assert any("registered after" in note for note in report.audit.notes) == (not expected)


@pytest.mark.parametrize("tag", ["gisp.digest", "gisp.keep_set_sha256", "metric.embedded_text_ppl_token_w128"])
def test_a_changed_tag(signed: Signed, registry: str, tag: str) -> None:
    _client(registry).set_model_version_tag("audited-gisp", str(_number(registry, "sp20")), tag, "other")
    (finding,) = _registry_findings(signed, registry)
    assert f"the tag {tag} is other" in finding.message


def test_a_deleted_version_and_a_forgotten_manifest(signed: Signed, registry: str) -> None:
    client = _client(registry)
    client.delete_model_version("audited-gisp", str(_number(registry, "sp40")))
    experiment = client.get_experiment_by_name("audited")
    (run,) = client.search_runs([experiment.experiment_id])
    client.delete_tag(run.info.run_id, MANIFEST_TAG)
    found = {finding.where: finding.message for finding in _registry_findings(signed, registry)}
    assert "no version points to" in found["audited-gisp, sp40"]
    assert "the manifest's digest there is None" in found[f"MLflow run of {signed.prefix.name}"]


def test_a_finished_run_stays_finished(signed: Signed, registry: str) -> None:
    """The summary that `gisp run` prints after the last task used to open the MLflow run again."""
    client = _client(registry)
    (run,) = client.search_runs([client.get_experiment_by_name("audited").experiment_id])
    assert run.info.status == "FINISHED"


# Replay


def _in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from gisp_tasks.audit import replay

    monkeypatch.setattr(
        replay, "run_in_child", lambda _, **arguments: replay.replay(**json.loads(json.dumps(arguments)))
    )


def test_replay_with_other_calibration_names_the_first_step(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens replaced and every record of them forged: only the computation can tell."""
    from safetensors.numpy import load_file, save_file

    path = copy.prefix / "calibration/tokens.safetensors"
    tensors = load_file(path)
    tensors["tokens"] = np.ascontiguousarray(tensors["tokens"][::-1])
    save_file(tensors, path)

    def along(manifest: Json) -> None:
        manifest["calibration"]["tokens_sha256"] = sha256_bytes(path.read_bytes())

    copy.forge(along)
    assert copy.verify().clean
    _in_place(monkeypatch)
    report = copy.verify(replay=True)
    assert places(report) == {("replay", "step 1")}
    assert "the removal order differs: removal" in messages(report, "replay")


def test_replay_says_where_the_machine_differs(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(manifest: Json) -> None:
        manifest["computed_on"][0] |= {"cpu": "Another Processor", "torch": "1.0"}
        manifest["environment"]["packages"]["transformers"] = "4.0"

    copy.forge(elsewhere)
    _in_place(monkeypatch)
    notes = "\n".join(copy.verify(replay=True).audit.notes)
    assert "with cpu Another Processor, here it is" in notes
    assert "with torch 1.0, here it is" in notes
    assert "transformers 4.0, here it is" in notes


def test_replay_needs_the_recorded_model(copy: Copy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def moved(manifest: Json) -> None:
        manifest["model"]["source"] = str(tmp_path / "other")

    shutil.copytree(copy.read()["model"]["source"], tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    copy.forge(moved)
    _in_place(monkeypatch)
    assert "is no longer the one that this run began with" in messages(copy.verify(replay=True), "replay")


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/nowhere/at/all",), "nothing of a run lies there"),
        (("http://example.org/run",), "http://example.org/run"),
        (("{prefix}", "--public-key", "/nowhere.pem"), "no such file"),
        (("{prefix}", "--public-key", "{recipe}"), "no public key was found in it"),
    ],
)
def test_bad_input(gisp: Any, signed: Signed, arguments: tuple[str, ...], message: str) -> None:
    filled = (argument.format(prefix=signed.prefix, recipe=signed.recipe) for argument in arguments)
    assert message in gisp.call("verify", *filled, status=2).stderr


def test_one_finding_a_line_and_status_1(gisp: Any, copy: Copy) -> None:
    copy.flip_byte(CHECKPOINT)
    copy.flip_byte(ORDER)
    lines = gisp.call("verify", str(copy.prefix), "--no-registry", status=1).stdout.splitlines()
    assert sum(line.startswith("objects ") for line in lines) == 2
    assert lines[-1].startswith(copy.prefix.as_uri())
    assert lines[-1].endswith("findings")
    report = json.loads(gisp.call("verify", str(copy.prefix), "--no-registry", "--json", status=1).stdout)
    assert report["clean"] is False
    assert {finding["where"] for finding in report["findings"]} >= {CHECKPOINT, ORDER}


def test_a_run_is_signed_afterwards(signed: Signed, copy: Copy) -> None:
    """Signing decides no byte of a run: its last tasks, started again with another key, only add what is missing."""
    from gisp_tasks.recipe import Recipe
    from gisp_tasks.stores.artifacts import open_store
    from gisp_tasks.tasks.report import report
    from gisp_tasks.tasks.upload_to_s3 import upload_to_s3

    (copy.prefix / "levels/sp20/model.sig").unlink()
    (copy.prefix / "manifest.sig").unlink()
    store = open_store(copy.prefix.as_uri())
    settings = ("publish.mlflow=null", f"publish.signing={{private_key_path: {signed.stranger}}}")
    recipe = Recipe.load(signed.recipe, settings).model_dump(mode="json")
    plan, order = (store.stat(key) for key in ("plan.json", ORDER))
    assert plan is not None
    assert order is not None
    before = {key: store.stat(key) for key in store.keys("")}
    for level in ("sp20", "sp40"):
        model = store.stat_directory(f"levels/{level}/model")
        assert model is not None
        upload_to_s3(recipe, plan.to_dict(), level, model.to_dict(), order.to_dict())
    report(recipe, plan.to_dict(), copy.read()["trigger"])
    after = {key: store.stat(key) for key in store.keys("")}
    assert after.keys() - before.keys() == {"levels/sp20/model.sig", "manifest.sig"}
    assert {key: after[key] for key in before} == before
    public = signed.stranger.with_suffix(".pub")
    # The signature that was there is the signer's.
    assert places(copy.verify(public_key=public)) == {("signatures", "levels/sp40/model.sig")}


# On S3


def test_a_run_on_s3(signed: Signed, s3: Any) -> None:
    """What the server says of an object is not believed: its bytes are read."""
    import boto3

    from gisp_tasks.stores.artifacts import open_store

    prefix = f"audit/runs/{signed.prefix.name}"
    store = open_store(f"s3://{s3.bucket}/{prefix}")
    for path in sorted(signed.prefix.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(signed.prefix).as_posix(), path)
    wanted = Wanted(registry=False, public_key=signed.public_key)
    clean = verify(store.uri, wanted)
    assert clean.clean
    client = boto3.client("s3")
    head = client.head_object(Bucket=s3.bucket, Key=f"{prefix}/{CHECKPOINT}")
    data = client.get_object(Bucket=s3.bucket, Key=f"{prefix}/{CHECKPOINT}")["Body"].read()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    client.put_object(Bucket=s3.bucket, Key=f"{prefix}/{CHECKPOINT}", Body=flipped, Metadata=head["Metadata"])
    client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/levels/sp20/reload.json")
    client.put_object(Bucket=s3.bucket, Key=f"{prefix}/planted.txt", Body=b"planted")
    assert store.stat(CHECKPOINT).sha256 == sha256_bytes(data)  # type: ignore[union-attr]
    report = verify(f"{store.uri}/manifest.json", wanted)
    assert places(report) >= {
        ("objects", CHECKPOINT),
        ("objects", "levels/sp20/reload.json"),
        ("objects", "planted.txt"),
        ("signatures", "levels/sp40/model.sig"),
    }
    assert report.audit.objects == clean.audit.objects - 1
