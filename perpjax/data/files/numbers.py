"""Numbers of files to float64: text, decimal commas, percent, decimals, and prices that went through float32."""

from decimal import Decimal, InvalidOperation

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from perpjax._describe import show
from perpjax.data.contract import DataError


def read_numbers(column: pa.ChunkedArray, source: str, name: str, *, comma: bool = False) -> np.ndarray:
    """Return a column as float64, each number the one nearest to its digits. Empty cells are NaN.

    A float32 becomes the shortest decimal that it could have come from.

    Args:
      comma: whether a comma is the decimal mark and a dot separates thousands.

    Raises:
      DataError: a value is no number.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_decimal(kind):
        column, kind = column.cast(pa.string()), pa.string()
    if pa.types.is_fixed_size_binary(kind):
        return _read_fixed(column, source, name)
    if pa.types.is_float32(kind):
        column, kind = column.cast(pa.string()), pa.string()
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        try:
            return pc.cast(column, pa.float64()).to_numpy().astype(np.float64)
        except pa.ArrowException:
            raise DataError(f"{source}: {name} has type {kind}, which is no number; name another column") from None
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    if comma:
        _refuse_dots(text, source, name)
        text = pc.replace_substring(pc.replace_substring(text, ".", ""), ",", ".")
    empty = pc.is_in(pc.utf8_lower(pc.fill_null(text, "")), pa.array(["", "nan", "null", "none", "n/a", "na", "-"]))
    filled = pc.if_else(empty, None, text)
    if pc.any(pc.match_substring(filled, "%")).as_py():
        return _read_percent(filled, source, name)
    try:
        return filled.cast(pa.float64()).to_numpy()
    except pa.ArrowException:
        good = pc.match_substring_regex(filled, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$").to_numpy(
            zero_copy_only=False
        )
        row = int(np.argmax(good == False))  # noqa: E712  (None where empty)
        raise DataError(
            f"{source}: row {row}: {name} = {_show(column[row])} is not a number; correct the row"
        ) from None


def _refuse_dots(text: pa.ChunkedArray, source: str, name: str) -> None:
    """Refuse dots that need not separate thousands: 55.496 may be either."""
    dotted = pc.fill_null(pc.match_substring(text, "."), False)
    grouped = pc.match_substring_regex(text, r"^[+-]?\d{1,3}(\.\d{3})+(,\d*)?$")
    proven = pc.any(pc.match_substring_regex(text, r",|\..*\.")).as_py()
    wrong = dotted if not proven else pc.and_(dotted, pc.invert(pc.fill_null(grouped, True)))
    if pc.any(wrong).as_py():
        row = int(np.argmax(wrong.to_numpy()))
        raise DataError(
            f"{source}: row {row}: {name} = {_show(text[row])}: a dot beside decimal commas may be a decimal mark or "
            "separate thousands; export the file with decimal points and without separators"
        )


def _read_percent(text: pa.ChunkedArray, source: str, name: str) -> np.ndarray:
    numbers = []
    for row, value in enumerate(text.to_pylist()):
        try:
            share = value is not None and value.endswith("%")
            if value is not None and not share and Decimal(value) != 0:
                raise DataError(
                    f"{source}: row {row}: {name} = {value!r} has no percent sign, and other rows have one; correct it"
                )
            numbers.append(np.nan if value is None else float(Decimal(value.rstrip("% ")) / (100 if share else 1)))
        except InvalidOperation:
            raise DataError(f"{source}: row {row}: {name} = {value!r} is not a number; correct the row") from None
    return np.array(numbers)


def _read_fixed(column: pa.ChunkedArray, source: str, name: str) -> np.ndarray:
    """Fixed-point numbers of nautilus: int64 / 1e9, or int128 / 1e16."""
    width = column.type.byte_width
    if width not in (8, 16):
        raise DataError(f"{source}: {name} has {width} bytes a value, which is no known number")
    data = b"".join(column.to_pylist())
    if width == 8:
        return np.array([x / 10**9 for x in np.frombuffer(data, "<i8").tolist()])  # a quotient of ints is exact
    return np.array([int.from_bytes(data[i : i + 16], "little", signed=True) / 10**16 for i in range(0, len(data), 16)])


def mend_float32(prices: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], bool]:
    """Round prices that went through float32 to the shortest decimal that they could have come from.

    Returns:
      The prices, and whether one changed. Prices that are no float32 stay as they are.
    """
    together = np.concatenate(list(prices.values()))
    with np.errstate(over="ignore"):
        single = together.astype(np.float32).astype(np.float64)
    if not np.isfinite(together).all() or (single != together).any():
        return prices, False
    values, which = np.unique(together, return_inverse=True)
    mended = np.array([float(str(x)) for x in values.astype(np.float32)])
    if (mended == values).all():
        return prices, False
    parts = np.split(mended[which], len(prices))
    return dict(zip(prices, parts, strict=True)), True


def _show(value: pa.Scalar) -> str:
    return show(repr(value.as_py()))[:60]
