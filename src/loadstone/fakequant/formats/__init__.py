"""Number formats: their specs (data) and the rounding itself (torch primitives, on any device)."""

from loadstone.fakequant.formats.spec import FORMATS, Format, WeightSpec, parse_format

__all__ = ["FORMATS", "Format", "WeightSpec", "parse_format"]
