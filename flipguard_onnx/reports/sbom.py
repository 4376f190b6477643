"""What guard() wrote, as a CycloneDX 1.6 ML-BOM.

It holds only what the run depends on and its result, so that the same run gives the same file:
there is no time of day in it, and the serial number is made from the content. The library does not
support model cards (CycloneDX/cyclonedx-python-lib#912), so parameters and drift are properties of
the model.
"""

from collections.abc import Iterator
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from ..errors import OptionError
from .guard import GuardReport
from .validation import pooled

try:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6
except ImportError:
    raise OptionError(
        "--sbom needs a package that is not installed: pip install 'cyclonedx-python-lib>=11'"
    ) from None


def sbom(report: GuardReport) -> str:
    """The BOM as JSON; its subject is the first model written."""
    tool = Component(
        name="flipguard-onnx",
        version=report.version,
        type=ComponentType.APPLICATION,
        bom_ref=f"flipguard-onnx@{report.version}",
    )
    source = _model(report.input, report.input_sha256, report.input_data_sha256, "")
    properties = [Property(name=name, value=value) for name, value in _properties(report)]
    models: list[Component] = []
    for number, path in enumerate(report.outputs):
        data = {
            Path(file).name: digest
            for file, digest in report.outputs_sha256.items()
            if file.startswith(f"{path}.")
        }
        model = _model(path, report.outputs_sha256[path], data, f"model{number}")
        model.pedigree = Pedigree(ancestors=[source])
        model.properties.update(properties)
        models.append(model)
    metadata = BomMetaData(tools=ToolRepository(components=[tool]), component=models[0])
    metadata.timestamp = None  # type: ignore[assignment]  # it may be left out
    bom = Bom(metadata=metadata, components=models[1:], serial_number=uuid5(NAMESPACE_URL, ""))
    bom.register_dependency(models[0], models[1:])
    bom.serial_number = uuid5(NAMESPACE_URL, _text(bom))
    return _text(bom)


def _model(path: str, sha256: str, data: dict[str, str], reference: str) -> Component:
    """A model file, with its data files as parts; `reference`, if any, is unique in the BOM."""
    return Component(
        name=Path(path).name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=reference or None,
        hashes=[_hash(sha256)],
        components=[
            Component(
                name=name,
                type=ComponentType.FILE,
                bom_ref=f"{reference}/{name}" if reference else None,
                hashes=[_hash(digest)],
            )
            for name, digest in data.items()
        ],
    )


def _hash(sha256: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=sha256)


def _properties(report: GuardReport) -> Iterator[tuple[str, str]]:
    for name, value in report.metadata().items():
        yield name.replace(".", ":"), value
    if report.scan:
        verdict = report.scan.verdict
        yield "flipguard:scan", ", ".join([verdict.level, *verdict.grids])
    if validation := report.validation:
        yield "flipguard:drift", f"{pooled(validation.guarded_exact):.6g}"
        yield "flipguard:drift_plain", f"{pooled(validation.plain_exact):.6g}"
        yield "flipguard:drift_inputs", f"{validation.feeds}, {validation.inputs}"
    else:
        yield "flipguard:drift", "not validated"


def _text(bom: Bom) -> str:
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
