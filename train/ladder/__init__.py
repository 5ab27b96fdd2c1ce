"""The learnability ladder: does a trainer find a signal where there is one, and stay out where there is none?

    python -m train.ladder
    python -m train.ladder --rungs leak ruin --seeds 2
    python -m train.ladder --broken all

`rungs` defines the rungs and their bounds. `markets` makes the data, `references` the policies to compare with.
`faults` breaks the trainer on purpose. `climb` runs it all.
"""
