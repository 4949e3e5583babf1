"""
Which head, sharpened alone, mends the loss past the training length; and how much attention each head gives the first
token of a row, from which NoPE can tell how far it is (Kazemnejad et al. 2023, theorem 1).

    python -m results.heads --ckpt out/nope --data data/passkey_long --length 1024 --factor 1.3

In a head that counts, the first token weighs as much as w others, however many there are: token n gives it the share
w / (w + n - 1) of its attention. Past the training length L that is less than it ever was in training. A temperature
lambda turns w into about w^lambda, so lambda = 1 + ln s / ln w brings the share at token s L back to what it is at L.
"""
import itertools
import math

import torch
from tqdm import tqdm

from data.checkpoint import check_fits, load_checkpoint, load_model
from data.figures import pyplot
from data.runtime import fail, parser, positive_float, positive_int
from data.tokens import anchor, open_data, open_rows, spaced_rows


def parse_args(argv=None):
    p = parser(__doc__)
    p.add_argument('--ckpt', required=True, help='checkpoint file or run folder')
    p.add_argument('--data', required=True, help='folder with val.bin and meta.json')
    p.add_argument('--length', type=positive_int, help='tokens a row (default: four times the training length)')
    p.add_argument('--factor', type=positive_float, default=1.3, help='what the temperature of a head is multiplied by')
    p.add_argument('--eval_tokens', type=positive_int, default=2**14, help='in rows of --length')
    p.add_argument('--plot', metavar='FILE.png', help='draw the loss and the share')
    args = p.parse_args(argv)
    if args.plot:
        pyplot(args.plot)                            # what is missing for it is known before the work
    return args


@torch.no_grad()
def losses(model, x, y, L):
    """x, y (rows, T) -> the mean loss in nats up to position L, and past it."""
    _, inside = model(x[:, :L], y[:, :L])
    _, past = model(x, y[:, L:], rows=slice(L, None))
    return inside.item(), past.item()


@torch.no_grad()
def on_first_token(model, x, places):
    """The share of attention that the tokens at these places (from 1) give the first: (n_layer, n_head, places)."""
    layers = []

    def look(attn, inputs, given):
        q, k, _ = attn.qkv(*inputs, given['rope'], given['grown'])
        k = k.repeat_interleave(attn.nh // attn.nkv, dim=1)
        shares = []
        for n in places:
            scores = q[:, :, n - 1:n] @ k[:, :, :n].transpose(2, 3) / math.sqrt(attn.hs)
            first = scores.softmax(-1)[:, :, 0, 0]   # (rows, nh)
            shares.append(first.mean(0))
        layers.append(torch.stack(shares, dim=1))

    hooks = [block.attn.register_forward_pre_hook(look, with_kwargs=True) for block in model.blocks]
    model(x, rows=slice(-1, None))
    for hook in hooks:
        hook.remove()
    return torch.stack(layers)


def first_token_weight(shares, places):
    """w, by the shares at these places; None if it is below 2 or varies by more than a fifth."""
    n = torch.tensor(places)
    w = (n - 1) * shares / (1 - shares).clamp(min=1e-7)
    if w.min() < 2 or w.max() > 1.2 * w.min():
        return None
    return w.mean().item()


def show(alone, base, shares, places):
    """The table, a line for each head."""
    lowest = min(past for _, past in alone.values())
    at = ''.join(f'{n:>8,}' for n in places)
    print(f'                   loss    past    share at{at}')
    print(f'as it is       {base[0]:8.3f}{base[1]:8.3f}')
    for (layer, head), (inside, past) in alone.items():
        share = ''.join(f'{value:8.3f}' for value in shares[layer, head])
        line = f'layer {layer:2} head {head:2}{inside:8.3f}{past:8.3f}            {share}'
        if past == lowest:
            line += '   <- lowest'
        print(line)


def plot(alone, base, shares, counting, places, L, args):
    """The loss past the training length with each head sharpened alone, and the share by place."""
    fig, (loss_ax, share_ax) = pyplot(args.plot).subplots(1, 2, figsize=(11, 4), layout='constrained')
    for i, ((layer, head), (_, past)) in enumerate(alone.items()):
        loss_ax.bar(i, past, color=f'C{layer}')
        share_ax.plot(places, shares[layer, head], color=f'C{layer}', linewidth=1)
    loss_ax.axhline(base[1], color='black', linestyle=':', label='as it is')
    loss_ax.set_xlabel(f'the head that is {args.factor:g} times as sharp')
    loss_ax.set_ylabel('loss past the training length (nats)')
    n_layer, n_head, _ = shares.shape
    loss_ax.set_xticks(range(0, n_layer * n_head, n_head), [f'layer {layer}' for layer in range(n_layer)])
    loss_ax.legend(fontsize='small', loc='lower right')
    for (layer, head), w in counting.items():
        share = w / (w + torch.tensor(places) - 1)
        share_ax.plot(places, share, color='black', linestyle=':')
        label = f'layer {layer} head {head}: {w:.0f} / ({w:.0f} + n - 1)'
        share_ax.annotate(label, (places[2], share[2]), xytext=(8, 4), textcoords='offset points')
    share_ax.axvline(L, color='black', linestyle='--', linewidth=1)
    share_ax.set_xscale('log', base=2)
    share_ax.set_xticks(places, [f'{n:,}' for n in places])
    share_ax.set(xlabel='token n (dashed: training length)', ylabel='share of its attention on the first token')
    fig.savefig(args.plot, dpi=130)
    print(f'\n{args.plot}')


def main(argv=None):
    args = parse_args(argv)
    ckpt = load_checkpoint(args.ckpt)
    model = load_model(ckpt).eval()
    c = model.config
    L = c.block_size
    T = args.length or 4 * L
    if c.pe in ('t5', 'alibi', 'learned') or any(c.layer_window):
        fail('this looks at layers of nope, rope or sinusoidal without windows; here are others')
    if any(block.attn.slope.any() for block in model.blocks):
        fail(f'{args.ckpt} has temperatures that grow with the length: give one without them')
    if T <= L:
        fail(f'--length {T} must be longer than the training length, {L}')

    # rows as the checkpoint was trained on
    data, meta = open_data(args.data, 'val')
    check_fits(c, meta, args.data, [T], ckpt)
    docs = open_rows(ckpt['args'].get('rows', 'anywhere'), data, meta, 'val', T, args.data)
    bos = None
    if docs is None and ckpt['args'].get('bos', True):
        bos = meta['bos']
    rows = [data[start:start + T + 1] for start in spaced_rows(data, T, args.eval_tokens, docs)]
    whole = anchor(rows, bos)
    x, y = whole[:, :-1], whole[:, 1:]

    places, n = [], T                                # T, T/2, T/4, ..., at most eight, the shortest first
    while n > 1 and len(places) < 8:
        places.insert(0, n)
        n //= 2
    shares = on_first_token(model, x, places)
    base = losses(model, x, y, L)
    alone = {}                                       # {(layer, head): losses}
    heads = list(itertools.product(range(c.n_layer), range(c.n_head)))
    for layer, head in tqdm(heads, desc='heads', leave=False, dynamic_ncols=True):
        scale = model.blocks[layer].attn.scale.data
        was = scale[head].item()
        scale[head] = was * args.factor
        alone[layer, head] = losses(model, x, y, L)
        scale[head] = was

    print(f'{args.ckpt}: loss in {len(x)} rows, up to token {L:,} and past it to {T:,}, with one head {args.factor:g} '
          'times as sharp;\nand the share of its attention that a token gives the first one\n')
    show(alone, base, shares, places)
    late = [n for n in places if n >= L // 4]        # before, w depends on which few tokens there are
    counting = {}                                    # {(layer, head): w}
    for layer, head in heads:
        w = first_token_weight(shares[layer, head, -len(late):], late)
        if w:
            counting[layer, head] = w
            factor = 1 + math.log(T / L) / math.log(w)
            print(f'\nlayer {layer} head {head} counts: the first token weighs as much as {w:.0f} others, from token '
                  f'{late[0]:,} to {T:,};')
            print(f'{factor:.2f} times as sharp it would give at {T:,} the share that it has at {L:,}')
    if args.plot:
        plot(alone, base, shares, counting, places, L, args)


if __name__ == '__main__':
    main()
