"""Each level: its checkpoint byte by byte and shape by shape, its place in the ladder, its metrics and its proof."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from gisp_tasks.audit.findings import Audit
from gisp_tasks.audit.objects import compare
from gisp_tasks.audit.signed import Signatures
from gisp_tasks.audit.subject import Json, Subject
from gisp_tasks.pruning.families import FAMILIES, ROWS
from gisp_tasks.pruning.layout import layer_layout
from gisp_tasks.pruning.plan import DENSE, DTYPE_BYTES, Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.refs import sha256_file
from gisp_tasks.tasks.gate import judge
from gisp_tasks.tasks.runtime import scratch
from gisp_tasks.tasks.upload_to_s3 import keep_set_digest

CHECK = "levels"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def check_levels(audit: Audit, subject: Subject, signatures: Signatures) -> None:
    """Every level of the recipe, from the densest, each against the one before; then the dense model's metrics."""
    with audit.guard(CHECK, Keys.MANIFEST):
        names = [level["name"] for level in subject.manifest["levels"]]
        audit.expect(CHECK, Keys.MANIFEST, "levels", found=names, recorded=[DENSE, *subject.run.recipe.level_names])
    keeps: list[KeepSets] = []
    with audit.guard(CHECK, Keys.ORDER):
        order, _ = subject.load_order(Keys.ORDER)
        for level in subject.level_records:
            with audit.guard(CHECK, level["name"]):
                _check_level(audit, subject, level, keeps, order)
    for level in subject.level_records:
        with audit.guard(CHECK, Keys.level(level["name"], "model")):
            _check_checkpoint(audit, subject, level, signatures)
    for level in subject.manifest["levels"]:
        with audit.guard(CHECK, Keys.level(level["name"], "evaluation")):
            _check_evaluation(audit, subject, level)


def _check_level(audit: Audit, subject: Subject, level: Json, keeps: list[KeepSets], order: RemovalOrder) -> None:
    """Keep-sets from the removal order, what the record says of them, and nesting; appends them to ``keeps``."""
    run, name = subject.run, level["name"]
    geometry, plan = run.geometry, run.plan.level(name)
    keep = order.level(plan.sparsity, geometry=geometry, width_multiple=run.limits.width_multiple)
    if keeps and not keeps[-1].contains(keep):
        audit.find(CHECK, name, "it keeps structures that the level before it does not: the levels are not nested")
    keeps.append(keep)
    layouts = [layer_layout(geometry, keep, layer) for layer in range(geometry.num_layers)]
    parameters = geometry.parameters_of(keep) + geometry.other_parameters
    expected = {
        "target_sparsity": plan.sparsity,
        "param_sparsity": geometry.sparsity_of(keep),
        "parameters": parameters,
        "weight_bytes": parameters * DTYPE_BYTES[run.recipe.model.dtype],
        "query_heads": [len(layout.query_heads) for layout in layouts],
        "kv_groups": [len(layout.kv_heads) for layout in layouts],
        "channels": [len(layout.channels) for layout in layouts],
        "keep_set_sha256": keep_set_digest(keep),
        "bytes": level["model"]["size"],
    }
    for what, found in expected.items():
        audit.expect(CHECK, name, what, found=found, recorded=level[what])
    audit.expect(CHECK, name, "its place", found=level["model"]["key"], recorded=Keys.level(name, "model"))
    record = subject.read_json(Keys.level(name, "level.json"))
    recorded = {**level, "evaluation": {key: level["evaluation"][key] for key in ("sha256", "metrics")}}
    audit.expect(CHECK, Keys.level(name, "level.json"), "the level's record", found=record, recorded=recorded)


def _check_checkpoint(audit: Audit, subject: Subject, level: Json, signatures: Signatures) -> None:
    """Read every file of the listing once; then the shapes in their headers, and the directory's signature."""
    key = level["model"]["key"]
    listing = subject.read_json(f"{key}.json")
    audit.expect(
        CHECK, key, "its size", found=sum(entry["size"] for entry in listing.values()), recorded=level["bytes"]
    )
    named = {f"{key}/{name}" for name in listing} | subject.manifest["artifacts"].keys()
    for other in sorted(set(subject.store.keys(key)) - named):
        audit.find("objects", other, "lies in the checkpoint's directory, and nothing names it")
    with scratch() as directory:
        checkpoint = directory / "model"
        checkpoint.mkdir()
        for name, entry in sorted(listing.items()):
            with audit.guard("objects", f"{key}/{name}"):
                path = subject.store.copy_out(f"{key}/{name}", checkpoint / name)
                compare(audit, f"{key}/{name}", entry, found=(sha256_file(path), path.stat().st_size))
        with audit.guard(CHECK, key):
            _check_sizes(audit, subject, level, checkpoint)
        for name in level["package"]:
            if name.startswith("model/"):  # read with the other objects; here for the signature of the directory
                with audit.guard(CHECK, Keys.level(level["name"], name)):
                    subject.store.copy_out(Keys.level(level["name"], name), directory / name)
        signatures.check(audit, subject, key, checkpoint)


def _check_sizes(audit: Audit, subject: Subject, level: Json, checkpoint: Path) -> None:
    """The sizes that the record gives for each layer are those of config.json and of the tensors."""
    key, geometry = level["model"]["key"], subject.run.geometry
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    sizes = zip(level["query_heads"], level["kv_groups"], level["channels"], strict=True)
    expected = {
        str(layer): {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": width}
        for layer, (heads, groups, width) in enumerate(sizes)
    }
    where = f"{key}/config.json"
    audit.expect(CHECK, where, "per_layer_config", found=config["per_layer_config"], recorded=expected)
    shapes, dtypes, parameters = _headers(checkpoint)
    for name, shape in _shapes(geometry, level):
        audit.expect(CHECK, key, f"the shape of {name}", found=shapes.get(name), recorded=shape)
    audit.expect(CHECK, key, "the number of parameters in its tensors", found=parameters, recorded=level["parameters"])
    audit.expect(CHECK, key, "the tensors' type", found=dtypes, recorded={_DTYPES[subject.run.recipe.model.dtype]})


def _headers(checkpoint: Path) -> tuple[dict[str, list[int]], set[str], int]:
    """Shape by tensor, the types, and the number of parameters of all safetensors files."""
    shapes: dict[str, list[int]] = {}
    dtypes: set[str] = set()
    parameters = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                shapes[name] = list(tensor.get_shape())
                dtypes.add(tensor.get_dtype())
                size = 1
                for extent in shapes[name]:
                    size *= extent
                parameters += size
    return shapes, dtypes, parameters


def _shapes(geometry: Geometry, level: Json) -> Iterator[tuple[str, list[int]]]:
    """The shape that each sliced weight has by the record's sizes."""
    for layer in range(geometry.num_layers):
        rows = {
            "query": level["query_heads"][layer] * geometry.head_dim,
            "key_value": level["kv_groups"][layer] * geometry.head_dim,
            "channel": level["channels"][layer],
        }
        for projection in FAMILIES[geometry.family].projections.values():
            sliced, whole = rows[projection.structure], geometry.hidden_size
            shape = [sliced, whole] if projection.axis == ROWS else [whole, sliced]
            yield f"model.layers.{layer}.{projection.path}.weight", shape


def _check_evaluation(audit: Audit, subject: Subject, level: Json) -> None:
    """Metrics and protocols from the files of the evaluation tasks; proof and gate of a pruned level."""
    name, run = level["name"], subject.run
    measured: Json = {"metrics": {}, "protocol": {}}
    for task in run.recipe.evaluation.tasks:
        part = subject.read_json(Keys.level(name, f"evaluation/{task}.json"))
        for section, values in measured.items():
            values.update(part[section])
    for section, found in measured.items():
        recorded = level["evaluation"][section]
        for metric in sorted(found.keys() | recorded.keys()):
            audit.expect(CHECK, name, f"{metric} ({section})", found=found.get(metric), recorded=recorded.get(metric))
    if "model" not in level:
        return
    key = Keys.level(name, "evaluation.json")
    audit.expect(CHECK, key, "the evaluation", found=subject.read_json(key), recorded=measured)
    dense = next(other for other in subject.manifest["levels"] if other["name"] == DENSE)
    gate = judge(run.recipe, run.geometry, record=level, dense=dense["evaluation"]["metrics"])
    audit.expect(CHECK, name, "the gate", found=gate, recorded=level["gate"])
    _check_proof(audit, subject, level)


def _check_proof(audit: Audit, subject: Subject, level: Json) -> None:
    from gisp_tasks.export.reload import MAX_LOGIT_DIFFERENCE, MAX_LOGIT_DIFFERENCE_REARRANGED

    key, proof = Keys.level(level["name"], "reload.json"), level["reload"]
    audit.expect(CHECK, key, "the reload proof", found=subject.read_json(key), recorded=proof)
    limit = MAX_LOGIT_DIFFERENCE_REARRANGED if subject.run.geometry.separate_heads else MAX_LOGIT_DIFFERENCE
    if not proof["max_logit_difference"] <= min(limit, proof["tolerance"]):
        audit.find(
            CHECK, key, f"the proof failed: logits differ by {proof['max_logit_difference']:g}, allowed is {limit:g}"
        )
