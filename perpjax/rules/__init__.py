"""The meaning of a bar: plain functions of numbers, in the order of docs/semantics.md.

They broadcast over trailing axes: an account's number is [] or [num_envs], a lot's [lots] or [lots, num_envs]. No
module here knows how XLA compiles it; `perpjax.xla` does.

    orders        actions, orders, verdicts
    risk          every reason to refuse an order
    execution     fills and slippage
    margin        funding, maintenance, liquidation prices
    intrabar      the level that a candle reaches first
    exits         the end of a lot, its money, the lots still held
    rewards       the rewards
    observation   nine numbers of the account
"""
