import { ParseResult, Schema } from "effect"
import { ExecError, FilesError } from "../errors.ts"
import { type ExitRecord, hasFailed, howEnded } from "../machine/ShimPlan.ts"
import { AgentFault } from "./AgentProtocol.ts"
import { VsockUnreachable } from "./Vsock.ts"

/** The agent answered with an error frame. */
export class AgentRefusal extends Schema.TaggedError<AgentRefusal>()("AgentRefusal", { fault: AgentFault }) {
  override get message(): string {
    return this.fault.message
  }
}

export const unavailable = (cause: unknown) =>
  new ExecError({
    code: "EXEC_AGENT_UNAVAILABLE",
    message: "the guest agent cannot be reached",
    hint: "the VM may have ended: `machinen ls` shows what is running",
    cause
  })

/** Whether another attempt may reach the guest. Not when the VM's socket is gone, because then the VM has ended. */
export const mayBeReachedLater = ({ cause, code }: ExecError): boolean =>
  code === "EXEC_AGENT_UNAVAILABLE" &&
  !(
    cause instanceof VsockUnreachable &&
    cause.cause instanceof Error &&
    "code" in cause.cause &&
    cause.cause.code === "ENOENT"
  )

export const lostConnection = (cause: unknown) =>
  new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "the connection to the guest broke", cause })

export const vmEnded = (exit: ExitRecord) =>
  new ExecError({
    code: hasFailed(exit) ? "EXEC_VM_FAILED" : "EXEC_VM_ENDED",
    message: `${howEnded(exit)} during the operation`,
    hint: "`machinen ls` shows what is running"
  })

/** The stream ended because guest or shim ended, not because a peer broke the protocol. */
export class StreamEnded extends Error {}

export const protocolError = (message: string, cause?: unknown) =>
  new ExecError({ code: "EXEC_PROTOCOL", message, cause })

const executableHint = (errno: string | undefined) => {
  switch (errno) {
    case "ENOEXEC":
      return "a shell script begins with `#!/bin/sh`; a program has to be made for this processor"
    case "ENOENT":
      return "install what runs it, or mend its first line"
    default:
      return "check its mode, and those of the directories above it"
  }
}

/** The agent has a fixed number of threads for each kind of work (docs/protocol.md §3.3); other work of that kind occupies them. */
const busyHint = "try again later, or end what the guest is occupied with"

export const toExecError = (error: ExecError | AgentRefusal): ExecError => {
  if (error._tag === "ExecError") return error
  const { code, errno, message } = error.fault
  const cause = errno === undefined ? undefined : new Error(errno)
  switch (code) {
    case "AGENT_NOT_FOUND":
      return new ExecError({
        code: "EXEC_COMMAND_NOT_FOUND",
        message,
        hint: "is it installed in the image, and on its PATH?",
        cause
      })
    case "AGENT_NOT_EXECUTABLE":
      return new ExecError({ code: "EXEC_NOT_EXECUTABLE", message, hint: executableHint(errno), cause })
    case "AGENT_CWD_INVALID":
      return new ExecError({
        code: "EXEC_CWD_INVALID",
        message,
        hint:
          errno === "EACCES"
            ? "let the command's user into the directory, or name another"
            : "create the directory first",
        cause
      })
    case "AGENT_TIMEOUT":
      return new ExecError({ code: "EXEC_AGENT_TIMEOUT", message, cause })
    case "AGENT_BUSY":
      return new ExecError({ code: "EXEC_GUEST_BUSY", message, hint: busyHint, cause })
    case "AGENT_MOUNT_BUSY":
      return new ExecError({ code: "EXEC_MOUNT_BUSY", message, cause })
    case "AGENT_ARGUMENTS_TOO_LARGE":
      return new ExecError({
        code: "EXEC_ARGUMENTS_TOO_LARGE",
        message,
        hint: "pass large data on stdin or in a file",
        cause
      })
    case "AGENT_SECRET_UNKNOWN":
      return new ExecError({
        code: "EXEC_SECRET_UNKNOWN",
        message,
        hint: "give it to the VM first; a copy has none of its source's",
        cause
      })
    case "AGENT_SESSION_NOT_FOUND":
      return new ExecError({
        code: "EXEC_SESSION_NOT_FOUND",
        message,
        hint: "`machinen sessions VM` lists those there are",
        cause
      })
    case "AGENT_SESSION_IN_USE":
      return new ExecError({
        code: "EXEC_SESSION_IN_USE",
        message,
        hint: "detach there, or take it with `steal` (`--steal`)",
        cause
      })
    case "AGENT_BAD_REQUEST":
      return new ExecError({ code: "EXEC_ARGUMENT_INVALID", message, cause })
    default:
      return new ExecError({ code: "EXEC_FAILED", message, cause })
  }
}

export const toFilesError =
  (guestPath: string) =>
  (error: unknown): FilesError => {
    if (error instanceof FilesError) return error
    if (error instanceof AgentRefusal) {
      const { code, errno, message } = error.fault
      const cause = errno === undefined ? undefined : new Error(errno)
      switch (code) {
        case "AGENT_NOT_FOUND":
          return new FilesError({ code: "FILES_NOT_FOUND", message, cause })
        case "AGENT_NO_SPACE":
          return new FilesError({
            code: "FILES_NO_SPACE",
            message,
            hint: "boot with a larger root disk (`--disk`, rootDiskSizeBytes)",
            cause
          })
        case "AGENT_WATCH_LIMIT":
          return new FilesError({
            code: "FILES_WATCH_LIMIT",
            message,
            hint: "raise that limit in the guest (sysctl), or watch less",
            cause
          })
        case "AGENT_BUSY":
          return new FilesError({ code: "FILES_GUEST_BUSY", message, hint: busyHint, cause })
        case "AGENT_BAD_REQUEST":
          return new FilesError({ code: "FILES_PATH_INVALID", message, cause })
        default:
          return new FilesError({ code: "FILES_GUEST_IO", message, cause })
      }
    }
    const isViolation =
      error instanceof ExecError && error.code === "EXEC_PROTOCOL" && !(error.cause instanceof StreamEnded)
    if (isViolation || error instanceof ParseResult.ParseError) {
      return new FilesError({
        code: "FILES_PROTOCOL",
        message: `the guest agent's answer about ${guestPath} is not what the protocol says: ${error.message}`,
        hint: "run `machinen install`: kernel and guest binary must come from the same release",
        cause: error
      })
    }
    return new FilesError({
      code: "FILES_AGENT_UNAVAILABLE",
      message: `the guest agent cannot be reached for ${guestPath}`,
      hint: "the VM may have ended: `machinen ls` shows what is running",
      cause: error
    })
  }

/** Maps the errors of an operation whose answer is decoded. */
export const toAnswerError = (error: ExecError | AgentRefusal | ParseResult.ParseError) =>
  error._tag === "ParseError" ? protocolError("unreadable answer", error) : toExecError(error)
