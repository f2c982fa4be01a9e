"""One asset check: its name and description, and whether a failure blocks downstream assets."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg

from sdxl_pipeline.config.schema.evaluation import Severity


@dataclass(frozen=True)
class Check:
    """A check of an asset. A failure of a blocking one is an error and stops downstream assets; of any other, a warning."""

    name: str
    description: str
    blocking: bool

    def configured(self, severities: Mapping[str, Severity]) -> "Check":
        """Return this check with the severity that `severities` has for its name; without an entry, unchanged."""
        severity = severities.get(self.name)
        return self if severity is None else replace(self, blocking=severity == "blocking")

    def spec(self, key: dg.AssetKey) -> dg.AssetCheckSpec:
        """Return the spec of this check on the asset `key`."""
        return dg.AssetCheckSpec(self.name, asset=key, description=self.description, blocking=self.blocking)

    def result(
        self, passed: bool, message: str, metadata: Mapping[str, Any] | None = None
    ) -> dg.AssetCheckResult:
        """Return a result of this check, with the severity that follows from `blocking`."""
        severity = dg.AssetCheckSeverity.ERROR if self.blocking else dg.AssetCheckSeverity.WARN
        return dg.AssetCheckResult(
            check_name=self.name, passed=passed, severity=severity, description=message, metadata=metadata
        )

    def inconclusive(self, message: str) -> dg.AssetCheckResult:
        """Return a result for a property that could not be measured: neither passed nor an error, so nothing is blocked."""
        return dg.AssetCheckResult(
            check_name=self.name, passed=False, severity=dg.AssetCheckSeverity.WARN, description=message
        )
