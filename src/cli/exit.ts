import { Data } from "effect"

/**
 * Ends the CLI with an exit code that is not an error of ours: the guest command's, or one of docker's conventions (125 our own failure,
 * 126 not executable, 127 not found, 130 interrupted).
 */
export class ExitWith extends Data.TaggedError("ExitWith")<{ readonly code: number }> {}
