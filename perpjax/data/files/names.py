"""Names of venues, symbols and kinds, as paths and files spell them."""

import re
from pathlib import Path

from perpjax.data.contract import DataError

VENUES = (
    "binance", "bybit", "okx", "okex", "gateio", "gate", "bitget", "hyperliquid", "deribit", "kraken",
    "krakenfutures", "ftx",
    "kucoin", "mexc", "htx", "huobi", "phemex", "coinbase",
)  # fmt: skip
QUOTES = ("USDT", "USDC", "BUSD", "FDUSD", "USD")
_KINDS = {
    "mark": "mark", "markprice": "mark", "markpriceklines": "mark", "funding": "funding", "fundingrate": "funding",
    "rate": "", "premiumindex": "premium", "premiumindexklines": "premium", "premium": "premium", "index": "index",
    "indexprice": "index", "indexpriceklines": "index", "spot": "spot",
}  # fmt: skip
_INTERVAL = re.compile(r"^\d{1,3}(s|m|min|h|d|w)$", re.IGNORECASE)
_FREQTRADE = re.compile(
    r"(?:^|_)(?P<symbol>[A-Z0-9]+_[A-Z0-9]+(?:_[A-Z0-9]+)?)-(?P<interval>\d+[smhdwM])(?:-(?P<kind>\w+))?$"
)
_WORD = re.compile(rf"^(?:1?[A-Z]+:)?([A-Z0-9]{{2,15}}?)({'|'.join(QUOTES)})(\.P|M|PERP)?$")


def read_path(path: Path) -> dict[str, str]:
    """Return the facts that a path shows: "symbol", "interval", "venue" and "kind", each only if it is clear."""
    hints: dict[str, str] = {}
    stem = path.name
    while Path(stem).suffix.lower() in (
        ".csv", ".json", ".jsonl", ".gz", ".zip", ".parquet", ".snappy", ".feather", ".txt", ".zst", ".bz2",
        ".xz", ".arrow",
    ):  # fmt: skip
        stem = stem[: -len(Path(stem).suffix)]
    folders = [part.lower() for part in path.parts[:-1]]
    # The name of a person is no kind.
    folders = [part for i, part in enumerate(folders) if i == 0 or folders[i - 1] not in ("home", "users")]
    words = [w for w in re.split(r"[^A-Za-z0-9.]+", stem) if w]
    for word in (*(w.lower() for w in words), *reversed(folders)):
        if word in VENUES:
            hints.setdefault("venue", {"okex": "okx", "gate": "gateio"}.get(word, word))
        kind = _KINDS.get(word.replace("_", ""))
        if kind and (word not in ("index", "premium") or any(_WORD.match(w.upper()) for w in words)):
            hints.setdefault("kind", kind)
    if "funding_rate" in stem.lower() or "fundingrate" in stem.lower().replace(" ", ""):
        hints["kind"] = "funding"
    if found := _FREQTRADE.search(stem):
        hints |= {"symbol": found["symbol"], "interval": found["interval"], "exporter": "freqtrade"}
        kind = (found["kind"] or "").lower()
        if kind in ("mark", "funding_rate", "index", "premiumindex"):
            hints["kind"] = {"funding_rate": "funding", "premiumindex": "premium"}.get(kind, kind)
        return hints
    if re.search(r"(?:^|_)\d?[A-Z]+_[A-Z0-9.]+, ?\d+", stem):
        hints["exporter"] = "tradingview"
    symbols = [w.upper() for w in words if _WORD.match(w.upper())]
    if swap := re.search(r"([A-Z0-9]{2,12})-(USDT|USDC|USD)-SWAP|([A-Z0-9]{2,12})(USD)_PERP", stem):
        symbols = [swap.group(0)]
    elif not symbols and (
        pair := re.search(r"(?<![A-Z0-9])([A-Z0-9]{2,12})[-_](USDT|USDC|USD|PERP)(?![A-Z])", stem.upper())
    ):
        symbols = [pair.group(0)]
    if len(set(symbols)) == 1:
        hints.setdefault("symbol", symbols[0])
    for word in words:
        if _INTERVAL.match(word):
            hints.setdefault("interval", word.lower())
    return hints


_INVERSE = (
    r"[A-Z0-9]+?[-_/]?USD[-_](PERP|SWAP|DMCBL|\d{6})",  # Binance and OKX, Bitget
    r"[A-Z0-9]+[-_/]USD[-_:](?!USD)[A-Z0-9]+",  # ccxt and freqtrade: BTC/USD:BTC, BTC_USD_BTC
    r"[A-Z0-9]+USD\.P",  # TradingView
    r"(XBTUSD|[A-Z0-9]{2,8}USDM)",  # BitMEX, KuCoin
    r"[FP]I_[A-Z]+USD(_\d+)?",  # Kraken
    r"(BTC|ETH)-(PERPETUAL|\d{1,2}[A-Z]{3}\d\d)",  # Deribit
)
"""Spellings of contracts that are settled in their base currency."""


def normalise_symbol(text: str, source: str, is_inverse: bool = False) -> str:
    """Return the symbol as Binance writes it, such as BTCUSDT.

    Raises:
      DataError: the contract is inverse: it is settled in its base currency, and its profit is not linear in the price.
    """
    name = re.sub(r"^\d?[A-Z]+:(?!USTF0)", "", text.strip().upper())
    if is_inverse or any(re.fullmatch(form, name) for form in _INVERSE):
        raise DataError(
            f"{source}: {text} is an inverse contract, settled in its base currency; its profit is not linear in the "
            "price, so it cannot be simulated here: use the USDT contract"
        )
    name = re.sub(r"^T([A-Z0-9]+)F0:USTF0$", r"\1USDT", name)  # Bitfinex
    name = re.sub(r"^PF_", "", name.partition(":")[0])  # Kraken
    name = re.sub(r"(\.P|[-_](SWAP|PERPETUAL|UMCBL|CMCBL))$", "", name)
    if found := re.match(r"^([A-Z0-9]+)[-_/]([A-Z0-9]+)[-_/]\2$", name):
        name = f"{found[1]}{found[2]}"
    if found := re.match(r"^([A-Z0-9]+)[-_/]?PERP$", name):
        name = found[1] if found[1].endswith(QUOTES) else f"{found[1]}USD"
    name = re.sub(r"(USDT|USDC)M$", r"\1", name)  # KuCoin
    name = re.sub(r"^XBT", "BTC", name)
    return re.sub(r"[-_/]", "", name)
