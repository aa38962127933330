"""Write text with a checkpoint, in memory that does not grow.

python -m lizard_jax.generate CKPT --prompt "Once upon a time" --max-new-tokens 200
python -m lizard_jax.generate CKPT --prompts prompts.jsonl > answers.jsonl
python -m lizard_jax.generate CKPT --interactive

CKPT is an HF directory or hub id, a Flax directory, or a run's stage directory; teacher or linearized.
"""

import argparse
import contextlib
import io
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from lizard_jax import devices
from lizard_jax.errors import UserError
from lizard_jax.program import ended, program


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    from lizard_jax.generate.sampling import Sampling

    parser = argparse.ArgumentParser(
        prog=program("python -m lizard_jax.generate"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="HF directory or hub id, Flax directory, or stage directory")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to continue; it is printed, then its continuation")
    what.add_argument(
        "--prompts", metavar="FILE",
        help="JSONL with a 'prompt' or 'messages' a line, continued as one batch; prints each line with "
        "'continuation', 'finish' (eos, stop, length, interrupted) and 'tokens'",
    )  # fmt: skip
    what.add_argument(
        "--interactive", action="store_true", help="a conversation, a line at a time; ctrl-C ends an answer, ctrl-D all"
    )
    parser.add_argument("--chat", action="store_true", help="put --prompt into the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to write (default %(default)s)")
    for field in fields(Sampling):
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=type(field.default), default=field.default,
            help=f"{field.metadata['help']} (default %(default)s)",
        )  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], help="string that ends the text; may be repeated")
    parser.add_argument("--save-state", metavar="FILE", help="keep the conversation's state in a small file")
    parser.add_argument("--load-state", metavar="FILE", help="go on from a kept state; --prompt is then optional")
    parser.add_argument(
        "--teacher", metavar="DIR", help="of a stage directory, where its teacher has moved (default: where it was)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as stored)"
    )
    devices.add_arguments(parser)
    return parser


class Session:
    """A model, its tokenizer, and how it is to write."""

    def __init__(self, args: argparse.Namespace) -> None:
        import lizard_jax
        from lizard_jax.generate.prompts import end_tokens, text_tokenizer
        from lizard_jax.generate.sampling import Sampling
        from pallas_kernels import partition

        self.args = args
        self.sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
        if args.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {args.max_new_tokens}, must be at least 1")
        self.model = lizard_jax.load(args.checkpoint, dtype=args.dtype, teacher=args.teacher, mesh=partition.mesh())
        self.tokenizer = text_tokenizer(self.model.source)
        self.eos = end_tokens(self.model.source, self.tokenizer)
        self.earlier: Any = None
        if args.load_state:
            from lizard_jax.generate import conversation

            self.earlier = conversation.load(args.load_state, self.model)

    def run(self, prompts: Sequence[Sequence[int]]) -> Any:
        """A generation with this session's settings."""
        from lizard_jax.generate.engine import Generation

        return Generation(
            self.model, self.tokenizer, prompts, max_new_tokens=self.args.max_new_tokens, sampling=self.sampling,
            stops=self.args.stop, eos=self.eos, earlier=self.earlier,
        )  # fmt: skip

    def keep(self, run: Any, messages: Sequence[dict[str, str]] = ()) -> None:
        """Writes the state where it was asked for, and says so."""
        from lizard_jax.generate import conversation

        if self.args.save_state:
            size = conversation.save(self.args.save_state, run.conversation(messages), self.model)
            note(f"state of {size:,} bytes in {self.args.save_state}")


def note(text: str) -> None:
    """A line for the reader, beside the output."""
    print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A piece of output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def interruptible(run: Any) -> Iterator[None]:
    """The first ctrl-C inside ends the text, and what follows is done as ever; the second ends the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # whoever started us wants no interrupts
        yield
        return

    def end_text(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        run.interrupt()

    signal.signal(signal.SIGINT, end_text)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def report(run: Any) -> None:
    """How fast it went; where it was interrupted, that ends the command.

    Raises:
        KeyboardInterrupt: the text was interrupted.
    """
    if run.interrupted:
        raise KeyboardInterrupt
    read, wrote = sum(len(row.prompt) for row in run.rows), sum(len(row.tokens) for row in run.rows)
    rate = (wrote - len(run.rows)) / run.decode_seconds if run.decode_seconds and wrote > len(run.rows) else 0.0
    note(
        f"read {read:,} tokens in {run.prefill_seconds:.1f} s, wrote {wrote:,} in {run.decode_seconds:.1f} s "
        f"({rate:,.0f} a second, compilation included)"
    )


def one(session: Session) -> None:
    """``--prompt``: the prompt and its continuation on stdout, as they come."""
    from lizard_jax.generate.prompts import chat_prompt, encode, next_turn

    args, earlier = session.args, session.earlier
    text, messages = args.prompt or "", []
    if not text and earlier is None:
        raise UserError("the prompt is empty; give --prompt TEXT, --prompts FILE or --interactive")
    if args.chat:
        messages = [*(earlier.messages if earlier else ()), {"role": "user", "content": text}]
        shown = next_turn(session.tokenizer, messages, earlier.pending[-1]) if len(messages) > 1 else None
        if shown is None:
            session.earlier = None
        ids = encode(session.tokenizer, shown or chat_prompt(session.tokenizer, messages), special=False)
    else:
        ids = encode(session.tokenizer, text, special=earlier is None) if text else []
    run = session.run([ids])
    say(text + "\n" * args.chat)
    try:
        with interruptible(run):
            for _, piece in run.pieces():
                say(piece)
    finally:
        say("\n")
    session.keep(run, [*messages, {"role": "assistant", "content": run.rows[0].text}] if args.chat else ())
    report(run)


def many(session: Session) -> None:
    """``--prompts``: a line of JSON for each line of the file, in its order."""
    from tqdm import tqdm

    from lizard_jax.generate.prompts import chat_prompt, encode, read_prompts

    if session.args.save_state or session.earlier is not None:
        raise UserError("--save-state and --load-state are for one conversation; leave out --prompts")
    records = read_prompts(session.args.prompts)
    ids = []
    for record in records:
        chat = "messages" in record
        text = chat_prompt(session.tokenizer, record["messages"]) if chat else record["prompt"]
        ids.append(encode(session.tokenizer, text, special=not chat))
    run = session.run(ids)
    try:
        total = len(records) * session.args.max_new_tokens
        with interruptible(run), tqdm(total=total, unit="token", file=sys.stderr, disable=None) as bar:
            for _ in run.pieces():
                bar.update(sum(len(row.tokens) for row in run.rows) - bar.n)
    finally:
        for record, row in zip(records, run.rows, strict=True):
            result = {"continuation": row.text, "finish": row.finish, "tokens": len(row.tokens)}
            say(json.dumps({**record, **result}, ensure_ascii=False) + "\n")
    report(run)


def converse(session: Session) -> None:
    """``--interactive``: lines in, answers out, one state throughout."""
    from lizard_jax.generate.prompts import chat_prompt, encode, next_turn

    chat = bool(session.tokenizer.chat_template)
    messages = list(session.earlier.messages) if session.earlier else []
    note(
        "a line, then Enter; ctrl-D ends" if chat else "no chat template: each line goes on with the text; ctrl-D ends"
    )
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            break
        text = line.rstrip("\n")
        if not text:
            continue
        if chat:
            messages = [*messages, {"role": "user", "content": text}]
            earlier = session.earlier
            turn = next_turn(session.tokenizer, messages, earlier.pending[-1]) if earlier else None
            if turn is None:
                session.earlier = None
            ids = encode(session.tokenizer, turn or chat_prompt(session.tokenizer, messages), special=False)
        else:
            ids = encode(session.tokenizer, text, special=session.earlier is None)
        run = session.run([ids])
        with interruptible(run):
            for _, piece in run.pieces():
                say(piece)
        say("\n")
        if run.interrupted:
            note("(interrupted)")
        messages = [*messages, {"role": "assistant", "content": run.rows[0].text}]
        session.earlier = run.conversation(messages)
        session.keep(run, messages)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return ended(lambda: _main(argv), interrupted="interrupted; what was written stands")


def _main(argv: Sequence[str] | None) -> int:
    args = arguments().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without the letters shows their numbers; nothing that was written is lost over one.
            stream.reconfigure(errors="backslashreplace")
    if args.prompt is None and not (args.prompts or args.interactive or args.load_state):
        raise UserError("nothing to continue; give --prompt TEXT, --prompts FILE or --interactive")
    if args.prompt is not None and not args.prompt and not args.load_state:
        raise UserError("the prompt is empty; give at least one character to go on from")
    with devices.over(args):
        session = Session(args)
        (many if args.prompts else converse if args.interactive else one)(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
