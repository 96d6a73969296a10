/** One terminal for several sandboxes. It takes commands while no sandbox is attached; an attached sandbox has keyboard and screen. */
import type { Readable, Writable } from "node:stream"
import { isMachinenError } from "../errors.ts"
import { leaveOutputAlone } from "../platform/tty.ts"
import { DetachKeys } from "../terminal/DetachKeys.ts"
import { type Sandboxes, type SandboxVm, unknownSandbox } from "./Sandboxes.ts"

export interface SupervisorOptions {
  readonly sandboxes: Sandboxes
  /** Default stdin. */
  readonly input?: Readable
  /** Default stdout. */
  readonly output?: Writable
  /** The characters with which a command line begins. Default `/`. */
  readonly commandPrefix?: string
  /** True: the attached sandbox gets keys as they are pressed. Default: whether the input is a terminal. */
  readonly rawTtyOnAttach?: boolean
  /** True: the attached sandbox gets the output's size. Default: whether the output is a terminal. */
  readonly forwardResize?: boolean
}

/** Members of a terminal's stream that other streams may lack. */
interface TtyInput extends Readable {
  readonly isTTY?: boolean
  readonly isRaw?: boolean
  readonly fd?: number
  readonly setRawMode?: (raw: boolean) => unknown
}
interface TtyOutput extends Writable {
  readonly isTTY?: boolean
  readonly columns?: number
  readonly rows?: number
}

/** Serves a terminal for a set of sandboxes. */
export class Supervisor {
  readonly sandboxes: Sandboxes
  readonly #input: TtyInput
  readonly #output: TtyOutput
  readonly #prefix: string
  readonly #raw: boolean
  readonly #forwardResize: boolean
  #running: Promise<void> | undefined
  #finish: () => void = () => {}
  #attached: { readonly vm: SandboxVm; readonly keys: DetachKeys; readonly leave: () => void } | undefined
  #line = Buffer.alloc(0)

  constructor(options: SupervisorOptions) {
    const { commandPrefix = "/", input = process.stdin, output = process.stdout, sandboxes } = options
    this.sandboxes = sandboxes
    this.#input = input
    this.#output = output
    this.#prefix = commandPrefix
    this.#raw = options.rawTtyOnAttach ?? this.#input.isTTY === true
    this.#forwardResize = options.forwardResize ?? this.#output.isTTY === true
  }

  /** Serves the input until its end or `stop()`. */
  run(): Promise<void> {
    this.#running ??= new Promise<void>((resolve) => {
      const onData = (chunk: Buffer | string) => this.#typed(typeof chunk === "string" ? Buffer.from(chunk) : chunk)
      const onEnd = () => this.#finish()
      const ends = ["end", "close", "error"] as const
      this.#finish = () => {
        this.#finish = () => {}
        this.#running = undefined
        this.detach()
        this.#input.off("data", onData)
        for (const end of ends) this.#input.off(end, onEnd)
        this.#input.pause()
        resolve()
      }
      for (const end of ends) this.#input.on(end, onEnd)
      this.#input.on("data", onData)
      if (this.#input.readableEnded || this.#input.destroyed) onEnd()
    })
    return this.#running
  }

  /** Ends `run()` and restores the terminal. The sandboxes keep running. */
  stop(): void {
    this.detach()
    this.#finish()
  }

  /** Shows a sandbox's last output and all further output, and sends it what is typed. */
  attach(id: string): void {
    const entry = this.sandboxes.get(id)
    if (entry === undefined) throw unknownSandbox(id)
    this.detach()
    const { scrollback, vm } = entry
    if (scrollback.length > 0) this.#output.write(scrollback)
    const unsubscribe = this.sandboxes.onOutput(id, (chunk) => void this.#output.write(chunk))

    const setRaw = this.#raw ? this.#input.setRawMode?.bind(this.#input) : undefined
    const wasRaw = this.#input.isRaw === true
    setRaw?.(true)
    if (setRaw !== undefined && this.#input.isTTY === true && this.#input.fd !== undefined)
      leaveOutputAlone(this.#input.fd)
    const resize = () => {
      const { columns, rows } = this.#output
      if (columns !== undefined && rows !== undefined && columns > 0 && rows > 0) vm.resize?.(columns, rows)
    }
    if (this.#forwardResize) {
      this.#output.on("resize", resize)
      resize()
    }
    const attached = {
      vm,
      keys: new DetachKeys(),
      leave: () => {
        unsubscribe()
        this.#output.off("resize", resize)
        setRaw?.(wasRaw)
      }
    }
    this.#attached = attached
    void this.sandboxes.end(id)?.ended.then(() => {
      if (this.#attached !== attached) return
      this.detach()
      this.#say(`sandbox ${id} has ended`)
    })
  }

  /** Detaches from the attached sandbox, if there is one. The sandbox keeps running. */
  detach(): void {
    const attached = this.#attached
    this.#attached = undefined
    attached?.leave()
  }

  #typed(bytes: Buffer): void {
    const attached = this.#attached
    if (attached === undefined) {
      this.#commands(bytes)
      return
    }
    const { detached, forward, rest } = attached.keys.push(bytes)
    if (forward.length > 0) attached.vm.stdin.write(forward)
    if (!detached) return
    this.detach()
    this.#say("detached")
    if (rest.length > 0) this.#typed(Buffer.from(rest))
  }

  /** Runs whole lines as commands. Bytes behind a line that attaches go to the sandbox. */
  #commands(bytes: Buffer): void {
    const all = Buffer.concat([this.#line, bytes])
    const end = all.findIndex((byte) => byte === 0x0a || byte === 0x0d)
    if (end === -1) {
      this.#line = all
      return
    }
    this.#line = Buffer.alloc(0)
    this.#command(all.subarray(0, end).toString().trim())
    const crLf = all[end] === 0x0d && all[end + 1] === 0x0a
    const rest = all.subarray(end + (crLf ? 2 : 1))
    if (rest.length > 0) this.#typed(rest)
  }

  #command(line: string): void {
    if (line === "") return
    const prefix = this.#prefix
    if (!line.startsWith(prefix)) {
      this.#say(`nothing is attached: ${prefix}help lists the commands`)
      return
    }
    const [name = "", ...args] = line.slice(prefix.length).split(/\s+/)
    if (name === "ls") this.#list()
    else if (name === "attach") this.#tryAttach(args.join(" "))
    else if (name === "help") this.#help()
    else if (name === "quit") this.stop()
    else this.#say(`there is no command ${prefix}${name}: ${prefix}help lists them`)
  }

  #help(): void {
    const prefix = this.#prefix
    const commands = [
      ["ls", "list the sandboxes"],
      ["attach <id>", "attach to one (ctrl-] twice leaves it)"],
      ["help", "list the commands"],
      ["quit", "stop; the sandboxes go on"]
    ] as const
    this.#say(commands.map(([command, what]) => `${`${prefix}${command}`.padEnd(16)}${what}`).join("\n"))
  }

  #list(): void {
    const lines = this.sandboxes.list().map(({ addedAt, id }) => {
      const seconds = Math.floor((Date.now() - addedAt) / 1000)
      return `${id}  ${this.sandboxes.end(id)?.isEnded === true ? "ended" : "running"}  ${seconds}s`
    })
    this.#say(lines.length === 0 ? "no sandboxes" : lines.join("\n"))
  }

  #tryAttach(id: string): void {
    try {
      this.attach(id)
    } catch (error) {
      if (!isMachinenError(error)) throw error
      this.#say(`${error.message}: ${this.#prefix}ls lists them`)
    }
  }

  #say(text: string): void {
    this.#output.write(`${text.replaceAll("\n", "\r\n")}\r\n`)
  }
}
