#!/bin/sh
# Real text: NoPE and RoPE models trained on books at length 256 (bytes), extended to 4 and 8 times that, and their
# perplexity by length on held-out books and on mathematics texts. Three folders of text files, one file a document:
#
#     sh results/books.sh BOOKS HELDOUT PROOFS      # results/books.csv; what is there already is not run again
#
# PYTHON names an interpreter that has the packages (default .venv/bin/python, which make test builds). The two models
# are trained side by side, one thread each, and so is what follows.
set -e
out=out/books
run() { echo "\$ python $*"; "${PYTHON:-.venv/bin/python}" "$@"; }

[ -f $out/books/meta.json ] || run -m data.text.prepare "$1" --val_files "$2" --out $out/books --tokenizer bytes
[ -f $out/proofs/meta.json ] || run -m data.text.prepare "$3" --val 1 --out $out/proofs --tokenizer bytes

export OMP_NUM_THREADS=1
train() {
    run train.py --preset tiny --n_layer 4 --n_embd 128 --n_head 4 --n_kv_head 4 --n_inner 352 --batch_tokens 8192 --steps 1200 --seed 1 \
        --dtype fp32 --pe $1 --data $out/books --out $out/$1 --resume > $out/$1.txt
}
train rope & other=$!
train nope; wait $other

# stretch PE METHOD LENGTH
stretch() { [ -f $out/$1/$2-$3.pt ] || run extend.py --ckpt $out/$1 --data $out/books --method $2 --length $3 --dtype fp32 --eval_tokens 0; }
# measure CKPT: on both corpora
measure() {
    for corpus in books proofs; do
        to=$out/on-$corpus/$(basename $(dirname $1))
        [ -f $to/$(basename $1 .pt).ppl.csv ] || run extend.py --ckpt $1 --data $out/$corpus --method none --lengths 256,384,512,768,1024,1536,2048 --stride 128 --eval_tokens 16384 --dtype fp32 --out $to
    done
}
both() { stretch $1 $2 $3; measure $out/$1/$2-$3.pt; }
(measure $out/nope/ckpt.pt; measure $out/rope/ckpt.pt; for n in 1024 2048; do both rope yarn $n; done; both nope uniform 1024; both nope head 1024; both nope head-log 1024) & other=$!
both nope uniform 2048; both nope head 2048; both nope head-log 2048; wait $other

echo corpus,model,checkpoint,length,stride,docs,tokens,nll,ppl > results/books.csv
for f in $out/on-*/*/*.ppl.csv; do
    row=$(echo $f | sed 's#.*/on-##; s#/#,#g; s#[.]ppl[.]csv##')
    tail -n +2 $f | tr -d '\r' | sed "s/^/$row,/" >> results/books.csv
done
cat results/books.csv
