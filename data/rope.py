"""
Slower rotation: the methods of extend.py for a model with RoPE. Formulas are in data/positions.py.

LongRoPE (Ding et al. 2024, sec. 3 and alg. 1) searches by evolution: from PI, NTK and YaRN, and for n-hat too, as in
the paper. Its temperature is that of its code (microsoft/LongRoPE), which differs in other points: results/README.md,
Protocol.
"""
import math
from typing import NamedTuple

import numpy as np
import torch

from data.extension import Record, best_of, loss_of, progress, set_heads
from data.positions import ntk, pi, rope_frequencies, yarn

ROPE = dict(pi=pi, ntk=ntk, yarn=yarn)


def set_frequencies(model, inv_freq, start=0):
    """Rotates by these hs/2 inverse frequencies, but the first `start` positions by those of training."""
    model.inv_freq.copy_(torch.tensor(inv_freq))
    model.config.rope_inv_freq = inv_freq
    model.config.rope_start = start


def stretch(model, corpus, args, env):
    """PI, NTK or YaRN: frequencies and a temperature by a formula; nothing is tuned."""
    inv_freq, lam = ROPE[args.method](model.config, args.length)
    set_frequencies(model, inv_freq)
    set_heads(model, lam)
    return Record()


def ntk_grid(model, corpus, args, env):
    """
    NTK set for a longer length than --length, which it is known to need: of the multiples on args.grid the best one, so
    that RoPE's simplest extension gets the search that uniform gets.
    """
    def use(times):
        inv_freq, _ = ntk(model.config, times * args.length)
        set_frequencies(model, inv_freq)
    return best_of(args.grid, use, 'ntk, set for so many times the length', model, corpus, args, env)


def longrope(model, corpus, args, env):
    """
    LongRoPE (Ding et al. 2024, eq. 3, alg. 1): a divisor for each frequency, and first positions that are not
    stretched, by evolution from PI, NTK and YaRN; lowest loss at args.length wins. The temperature is that of its code,
    1 + ln s / ln L for s = length / L (there the root of it, on q and on k).
    """
    config = model.config
    trained = rope_frequencies(config)
    scale = args.length / config.block_size
    largest = 1.25 * scale
    set_heads(model, 1 + math.log(scale) / math.log(max(2, config.block_size)))

    def rotate_by(candidate):
        inv_freq = np.divide(trained, candidate.divisors).astype(np.float32)
        set_frequencies(model, inv_freq.tolist(), candidate.start)

    def loss(candidate):
        rotate_by(candidate)
        return loss_of(model, corpus, args, env)

    seeds = {}
    for name, rule in ROPE.items():
        inv_freq, _ = rule(config, args.length)
        divisors = np.clip(np.divide(trained, inv_freq), 1.0, largest)
        seeds[name] = Candidate(tuple(divisors.tolist()), 0)

    total = args.population + 2 * (args.population // 4) * args.iterations
    with progress(env, total=total, desc=f'longrope at {args.length}') as bar:
        def tried(lowest):
            bar.update()
            bar.set_postfix_str(f'loss {lowest:.4f}')
        rng = np.random.default_rng(args.seed)
        losses, curve = search(list(seeds.values()), largest, loss, args.population, args.iterations, rng, tried)

    best = min(losses, key=losses.get)
    rotate_by(best)
    for name, seed in seeds.items():
        env.print(f'  {name:8} {losses[seed]:.4f}')
    divisors = ' '.join(f'{r:.2f}' for r in best.divisors)
    env.print(f'  longrope {losses[best]:.4f}  n-hat {best.start}, divisors {divisors}')
    return Record(curve=curve, batches=len(losses) * args.grid_batches)


# ---------------------------------------------------------------------------------------------------------------------
# the search

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
