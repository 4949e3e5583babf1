"""
How the best uniform temperature grows with length: fits lambda = 1 + a ln s to checkpoints that extend.py --method
uniform wrote for several lengths of one model. uniform finds one lambda for all positions past the training length,
and so s is the typical one of them, in training lengths.

    for n in 384 512 768 1024 1536 2048; do
        python extend.py --ckpt out/nope --data data/passkey_long --method uniform --length $n --eval_tokens 0
    done
    python -m results.fit out/nope/uniform-*.pt

Wang et al. 2024 (app. B) find a = 0.3010 after 10k steps of pre-training and 0.3973 after 50k (R2 0.995, 0.977), for
the best lambda of each position; DroPE (app. C.2) finds 0.412 and, with QK-norm, 0.103.
"""
import math

import numpy as np

from data.checkpoint import load_checkpoint
from data.runtime import fail, parser


def lowest(curve):
    """[(lambda, loss)] -> the lambda of the parabola through the lowest point of the grid and its neighbours."""
    x, y = np.array(sorted(curve)).T
    i = int(y.argmin())
    if not 0 < i < len(x) - 1:
        return float(x[i])
    a, b, _ = np.polyfit(x[i - 1:i + 2] - x[i], y[i - 1:i + 2], 2)
    return float(x[i] - b / (2 * a))


def fit(s, lam):
    """Least squares of lam = 1 + a ln s, through 1 at s = 1 -> (a, R2)."""
    s, lam = np.log(s), np.asarray(lam)
    a = ((lam - 1) @ s) / (s @ s)
    return float(a), float(1 - ((lam - 1 - a * s) ** 2).sum() / max(1e-12, ((lam - lam.mean()) ** 2).sum()))


def typical(times):
    """
    The geometric mean of the positions from 1 to `times` training lengths, in training lengths: where 1 + a ln s has
    its mean over them.
    """
    return math.exp(times * math.log(times) / (times - 1) - 1)


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('ckpts', nargs='+', metavar='CKPT',
                   help='checkpoints of one model by extend.py --method uniform, at two lengths or more')
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    points = []
    for file in args.ckpts:
        ckpt = load_checkpoint(file)
        how = ckpt['extended']
        if not how or how['method'] != 'uniform' or how.get('law'):
            fail(f'{file} was not made by extend.py --method uniform')
        L = ckpt['config']['block_size']
        if how['length'] > L:
            points.append((how['length'], typical(how['length'] / L), lowest(how['curve'])))
    points.sort()
    if len({n for n, _, _ in points}) < 2:
        fail('a fit needs two lengths or more past the training length')
    a, r2 = fit([s for _, s, _ in points], [lam for _, _, lam in points])
    print('  length      s   best lambda   1 + a ln s   paper, 10k and 50k steps')
    for n, s, lam in points:
        log_s = math.log(s)
        ours, paper_10k, paper_50k = 1 + a * log_s, 1 + 0.3010 * log_s, 1 + 0.3973 * log_s
        print(f'{n:>8} {s:>5.2f}x {lam:>12.3f} {ours:>12.3f} {paper_10k:>15.3f} {paper_50k:.3f}')
    print(f'lambda = 1 + {a:.4f} ln s, R2 {r2:.4f}')


if __name__ == '__main__':
    main()
