import { Data } from "effect"

/**
 * Ends the CLI with an exit code and without a message: the guest command's code, or one of docker's conventions (125 failure of the CLI itself,
 * 126 not executable, 127 not found, 130 interrupted).
 */
export class ExitWith extends Data.TaggedError("ExitWith")<{ readonly code: number }> {}
