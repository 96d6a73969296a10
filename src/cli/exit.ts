import { Console, Data, Effect } from "effect"

/**
 * Ends the CLI with an exit code and without a message: the guest command's code, or one of docker's conventions (125 failure of the CLI itself,
 * 126 not executable, 127 not found, 130 interrupted).
 */
export class ExitWith extends Data.TaggedError("ExitWith")<{ readonly code: number }> {}

/** Exits with the code of a command in a terminal, or with 128 + SIGHUP when the terminal here has gone before the command's end. */
export const exitWithTerminal = (code: number | "detached") => new ExitWith({ code: code === "detached" ? 129 : code })

/** Says that the guest's kernel killed a command for want of memory, which its code (137) alone does not tell. */
export const tellOutOfMemory = ({ oomKilled }: { readonly oomKilled: boolean }): Effect.Effect<void> =>
  oomKilled
    ? Console.error("machinen: the guest ran out of memory and its kernel killed the command (--memory)")
    : Effect.void
