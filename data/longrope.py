"""
LongRoPE's search (Ding et al. 2024, sec. 3 and alg. 1): by evolution, a divisor for each frequency of RoPE, and how
many first positions are not stretched. Probabilities and retries are those of its code (microsoft/LongRoPE). Two things
differ from the code and follow the paper: it starts from PI, NTK and YaRN, not from YaRN alone, and it searches n-hat.
"""
from typing import NamedTuple

import numpy as np

N_HAT = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
MUTATED = 0.3                    # probability that mutation draws a number anew
CROSSED = 0.15                   # probability that crossing takes a number from the second parent
STEP = 0.01                      # of a divisor
TRIES = 100                      # to make a candidate that is valid and new


class Candidate(NamedTuple):
    divisors: tuple              # of the hs/2 frequencies, 1 <= r_0 <= r_1 <= ... <= 1.25 s
    start: int                   # n-hat: so many first positions are not stretched


def search(seeds, largest, loss, population, iterations, rng, after_each):
    """
    seeds: candidates to start from. largest: of a divisor. loss: a function of a candidate. Tries `population` of them,
    then in each of the iterations half as many, made of the best: mutants and crossings in turn.
    after_each(lowest loss so far) is called after each one that was tried. -> {candidate: loss}, all that were tried;
    [(candidates so far, lowest loss)] after each generation.
    """
    losses, curve = {}, []
    quarter = population // 4

    def pick(candidates):
        return candidates[int(rng.integers(len(candidates)))]

    def new(make):
        """What make() returns, tried again until it is valid and unseen; None where that does not happen."""
        for _ in range(TRIES):
            candidate = make()
            if candidate is not None and candidate not in losses and candidate not in generation:
                return candidate
        return None

    generation = list(seeds)
    while len(generation) < population:
        mutant = new(lambda: mutate(pick(seeds), largest, rng))
        if mutant is None:
            break
        generation.append(mutant)
    for _ in range(iterations + 1):
        for candidate in generation:
            losses[candidate] = loss(candidate)
            after_each(min(losses.values()))
        parents = sorted(losses, key=losses.get)[:max(2, 2 * quarter)]
        curve.append((len(losses), losses[parents[0]]))
        generation = []
        for i in range(2 * quarter):
            child = None
            if i % 2:
                child = new(lambda: cross(pick(parents), pick(parents), rng))
            if child is None:                        # a mutant in its place where crossing makes nothing new
                child = new(lambda: mutate(pick(parents), largest, rng))
            if child is not None:
                generation.append(child)
    return losses, curve


def mutate(candidate, largest, rng):
    """Some divisors drawn anew between their neighbours, in steps of 0.01, and perhaps n-hat, from its list."""
    divisors, start = list(candidate.divisors), candidate.start
    low = 1.0
    for i, high in enumerate(divisors[1:] + [largest]):
        if rng.random() < MUTATED:
            steps = int((high - low) / STEP + 1e-6)              # the sum of steps may fall short by a rounding
            divisors[i] = min(high, low + STEP * int(rng.integers(steps + 1)))
        low = divisors[i]
    if rng.random() < MUTATED:
        start = int(rng.choice(N_HAT))
    return Candidate(tuple(divisors), start)


def cross(a, b, rng):
    """Candidate a with some of its numbers from b; None where the divisors do not increase then."""
    from_b = rng.random(len(a.divisors) + 1) < CROSSED
    divisors = np.where(from_b[:-1], b.divisors, a.divisors)
    start = b.start if from_b[-1] else a.start
    if (np.diff(divisors) < 0).any():
        return None
    return Candidate(tuple(divisors.tolist()), start)
