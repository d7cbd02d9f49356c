"""Random models, trained in random ways, held against float64.

    python -m tests.fuzz --cases 200 --seed 0     many cases, one line per failure, a summary
    python -m tests.fuzz --case '{"seed": 7}'     one case, as a failure's line gives it
    python -m tests.fuzz.masks --cases 2000       attention masks, for the pass on causal ones

`case` draws what a case is, `blocks` and `model` build it, `losses` reduces it to a scalar, `ways`
trains it, `check` says whether the numbers are right, `shrink` makes a failing case small.
"""
