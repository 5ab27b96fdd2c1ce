"""The learnability ladder: does a trainer find what is there, and leave alone what is not?

    python -m train.ladder
    python -m train.ladder --rungs leak ruin --seeds 2
    python -m train.ladder --broken all

`rungs` says what each rung trains on and what must hold, `markets` and `references` what it is compared with,
`faults` breaks the trainer on purpose, and `climb` runs it all.
"""
