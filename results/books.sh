#!/bin/sh
# Real text: NoPE and RoPE trained on books at length 256 (bytes), two seeds, extended to 4 and 8 times that, and their
# perplexity by length on held-out books and on mathematics texts. Three folders of text files, one file a document:
#
#     sh results/books.sh BOOKS HELDOUT PROOFS      # results/books.csv; what is there already is not run again
#
# PYTHON names an interpreter that has the packages (default .venv/bin/python, which make test builds). Models and tuning
# are those of the headline, but for a wider SwiGLU and rows that begin anywhere. Two commands run at a time, with one
# thread each. YaRN for each length (dynamic YaRN) is measured at that length alone.
set -e
export OMP_NUM_THREADS=1
out=${OUT:-out/books}
lengths="256 384 512 768 1024 1536 2048"
run() { echo "\$ python $*"; "${PYTHON:-.venv/bin/python}" "$@"; }

[ -f $out/books/meta.json ] || run -m data.text.prepare "$1" --val_files "$2" --out $out/books --tokenizer bytes
[ -f $out/proofs/meta.json ] || run -m data.text.prepare "$3" --val 1 --out $out/proofs --tokenizer bytes

# train PE SEED
train() {
    run train.py --preset tiny --n_inner 352 --pe $1 --rows anywhere --batch_tokens 8192 --steps 2400 --seed $2 \
        --data $out/books --out $out/$1-$2 --resume >> $out/$1-$2.txt
}

# stretch MODEL METHOD LENGTH
stretch() {
    [ -f $out/$1/$2-$3.pt ] ||
        run extend.py --ckpt $out/$1 --data $out/books --method $2 --length $3 --steps 60 --batch 4 --dtype fp32 \
            --eval_tokens 0
}

# measure MODEL CHECKPOINT LENGTHS: on both corpora, the same bytes at every length
measure() {
    for corpus in books proofs; do
        to=$out/on-$corpus/$1
        [ -f $to/$2.ppl.csv ] ||
            run extend.py --method none --ckpt $out/$1/$2.pt --data $out/$corpus --out $to --dtype fp32 \
                --lengths $(echo $3 | tr ' ' ,) --past 2048 --stride 128 --eval_tokens 16384 --measure ppl
    done
}

# temperatures SEED LENGTH
temperatures() {
    for method in uniform head head-log; do
        stretch nope-$1 $method $2
        measure nope-$1 $method-$2 "$lengths"
    done
}

# yarn SEED
yarn() {
    for n in 384 512 768 1536; do
        stretch rope-$1 yarn $n
        measure rope-$1 yarn-$n $n
    done
    for n in 1024 2048; do
        stretch rope-$1 yarn $n
        measure rope-$1 yarn-$n "$lengths"
    done
}

for seed in 1 2; do
    train rope $seed & other=$!
    train nope $seed
    wait $other
    (measure rope-$seed ckpt "$lengths"; yarn $seed; temperatures $seed 1024) & other=$!
    measure nope-$seed ckpt "$lengths"
    temperatures $seed 2048
    wait $other

    # the table so far
    echo corpus,model,checkpoint,length,stride,docs,tokens,nll,ppl > results/books.csv
    for f in $out/on-*/*/*.ppl.csv; do
        row=$(echo $f | sed 's#.*/on-##; s#/#,#g; s#[.]ppl[.]csv##')
        tail -n +2 $f | tr -d '\r' | sed "s/^/$row,/" >> results/books.csv
    done
done
cat results/books.csv
