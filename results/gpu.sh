#!/bin/sh
# What a GPU of 80 GB is to be measured for, in stages that each fit into ten minutes. Rows go to results/gpu.csv as
# they are made, errors too; what has its rows is left out, so a stage that was stopped goes on where it was.
#
#     sh results/gpu.sh attention compile train       # these, one after the other
#     sh results/gpu.sh toy                           # a rehearsal: all of them, small, on any machine
#
# attention   which kernel attention reaches, in each encoding and precision; an error where it writes whole scores
# compile     graph breaks, in each encoding; an error where there is one
# train       the 1.1B model on random tokens: tokens/s, MFU, memory
# tune        head tuning of one row, by length: seconds, memory
# passkey     eval_passkey.py with the paper's grid up to 32K, random weights
# perplexity  measuring it beside bare forward passes
# peers       nanoGPT (NANOGPT=DIR, a clone of it), a Hugging Face Llama (where transformers is installed), and ours
# ddp         training in two processes, where there are two GPUs
# small       make reproduce SCALE=small on TEXT=DIR, which data.text.prepare made; again until it is done
# recalibrate SmolLM2 without RoPE, by DroPE's recipe, then measured. SMOLLM2=DIR: a folder of its own, with ckpt.pt and
#             text/ (results/README.md says how to make it); again until no row of it says unfinished
#
# PYTHON: an interpreter that has the packages (default python3); OUT_DIR: for checkpoints and runs (default out/gpu);
# CSV: another file for the rows. Nothing here needs a network, if tiktoken has the data's tokenizer in its cache.
stages="attention compile train tune passkey perplexity peers ddp small recalibrate"
python=${PYTHON:-python3}
out=${OUT_DIR:-out/gpu}
csv=${CSV:-results/gpu.csv}
toy=
[ $# -gt 0 ] || { echo "usage: sh results/gpu.sh STAGE ..., of: $stages; or toy" >&2; exit 2; }

if [ "$1" = toy ]; then
    set -- $stages
    toy=--toy
    out=${OUT_DIR:-out/gpu-toy}
    csv=${CSV:-$out/gpu.csv}
    TEXT=$out/text
    SMOLLM2=$out/smollm2
    mkdir -p "$out/books"
    for book in 1 2 3 4; do
        for chapter in $(seq $((300 + book))); do
            echo "Chapter $chapter. It was a quiet year, and nothing came of it."
        done > "$out/books/$book.txt"
    done
    "$python" -m data.text.prepare "$out/books" --val 0.05 --tokenizer bytes --out "$TEXT" || exit
    "$python" -m data.text.prepare "$out/books" --val 0.05 --tokenizer bytes --out "$SMOLLM2/text" || exit
    "$python" train.py --resume --data "$SMOLLM2/text" --out "$SMOLLM2" --pe rope --block_size 320 --n_layer 1 \
        --n_embd 32 --n_inner 48 --no-qk_norm --no-qk_gain --rows anywhere --steps 3 --batch_tokens 640 \
        --eval_tokens 640 || exit
fi

failed=0
for stage in "$@"; do
    case $stage in
        peers)
            [ -n "$NANOGPT" ] || echo "peers: no row for nanoGPT without NANOGPT=DIR"
            "$python" -m data.passkey.prepare --out "$out/data" --tokens 100000
            ;;
        small) [ -n "$TEXT" ] || echo "small: no row without TEXT=DIR" ;;
        recalibrate) [ -n "$SMOLLM2" ] || echo "recalibrate: no row without SMOLLM2=DIR" ;;
        ddp) echo "ddp: no row where there is one GPU" ;;
    esac
    timeout -k 30 590 "$python" -m results.gpu "$stage" $toy --out "$out" --csv "$csv" \
        ${NANOGPT:+--nanogpt "$NANOGPT"} ${TEXT:+--text "$TEXT"} ${SMOLLM2:+--smollm2 "$SMOLLM2"}
    code=$?
    [ $code = 0 ] || { echo "$stage: exit code $code, see the lines above; the other stages go on"; failed=1; }
done
exit $failed
