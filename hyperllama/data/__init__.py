"""From text files to training batches.

    .txt .jsonl .parquet  files, globs, folders, datasets by name                 text.py, datasets.py
          |  iter_documents: one at a time, errors name file and record
          v
      documents           text, language, id
          |  a recipe's choice: ids, copies, shuffling, budgets                  recipe.py
          v
       tokens             each document's tokens + EOS, one after another         tokenizer.py
          |  build: many processes, resumable, hashed, atomic                    build.py
          v                                         (datatrove's .ds files:      ds.py)
       shards             [d0 d0 d0 E d1 E d2 d2 d2 d2 d2 E d3 ...]   uint16 or uint32, memory mapped
          |  cut into windows of T+1 tokens, none overlapping                    shards.py
          v
       mixture            global window i -> (source, window of that source)     mixture.py, weights.py, stages.py
          |  a pure function of (seed, i): weights kept, each window once per epoch
          |  (the last step of a stage, where asked, as nanotron fills it: tail.py)
          v
       windows            i = 0 1 2 3 4 5 6 7 8 9 ...
          |  step s takes the windows [first, first + count); rank r a contiguous slice of them
          v
       batches            ids (B, T), targets (B, T), documents' borders         loader.py

Nothing on the way holds the corpus, draws from a stateful generator or depends on the number of processes:
where a run stands in its data is one integer, the number of windows it has seen.

Long functions take `progress(done, total)`, both in bytes of input, called now and then.
"""
