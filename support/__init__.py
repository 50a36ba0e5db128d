"""What a run needs around the three commands and the five concepts. Arrows point down this list:

    command        what the three commands share: a command line, a named model, an error as one line
    run            a run on disk and on the terminal: directory, log, evaluations, signals
    checkpoint     what a stopped run goes on from
    report         what is printed and drawn: tables, warnings, the model card, plots
    preferences    pairs: from text to loss, and the loop that trains on them alone
    memory         what a step takes, and the largest micro-batch that fits
    data           what a run trains and evaluates on: read, split, measured
    settings       every flag, its help and its bounds
    tiny           the embedded task and its model
    model          a language model: loaded, compared with its plain forward, LoRA, saved
    scoring        log-probabilities and hidden states of completions; the score matrix
    sampling       completions by name: any batch, device and number of processes gives the same
    prefix         a prompt goes through the model once; its completions share keys and values
    answers        what a completion says: its text, its chain of thought, its answer
    prompts        from a question and a principle to tokens: template, BOS, ends of a turn
    files          principles, questions, examples and pairs as records, read from files; files written
    rows           rows of .jsonl, .csv, .parquet and data sets, as they stand, and their fields
    parallel       several processes, by torch.distributed
    errors         a user's mistake in one line; a number that is not finite
"""
