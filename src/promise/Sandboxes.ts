/** A set of VMs, or of other programs with streams: keeps and passes on their output, and sends input to one of them. */
import type { Readable, Writable } from "node:stream"
import { isMachinenError, SandboxError } from "../errors.ts"
import { Tail } from "../platform/Tail.ts"

/** The part of a VM that a sandbox needs. `VmHandle` and `PtyVmHandle` have it. */
export interface SandboxVm {
  readonly stdin: Writable
  readonly stdout: Readable
  /** May be the same stream as `stdout`. */
  readonly stderr: Readable
  readonly wait: () => Promise<unknown>
  /** As `wait`, without a time limit; preferred where it is there. */
  readonly ended?: () => Promise<unknown>
  /** Resizes the terminal; absent without a terminal. */
  readonly resize?: (cols: number, rows: number) => void
}

export interface SandboxEntry<Vm extends SandboxVm = SandboxVm> {
  readonly id: string
  readonly vm: Vm
  /** The last bytes of both streams, in the order in which they arrived. */
  readonly scrollback: Buffer
  /** Unix milliseconds. */
  readonly addedAt: number
}

export type OutputSource = "stdout" | "stderr"
export type OnOutputListener = (chunk: Buffer, source: OutputSource) => void

interface Sandbox<Vm> {
  readonly vm: Vm
  readonly addedAt: number
  readonly scrollback: Tail
  readonly listeners: Set<OnOutputListener>
  readonly forget: () => void
  isEnded: boolean
  ended: Promise<void>
}

/** Sandboxes by id. The set does not own the VMs: removing one does not end it. */
export class Sandboxes<Vm extends SandboxVm = SandboxVm> {
  /** Bytes of output that are kept of each sandbox. */
  readonly scrollbackBytes: number
  readonly #sandboxes = new Map<string, Sandbox<Vm>>()

  constructor({ scrollbackBytes = 65_536 }: { readonly scrollbackBytes?: number } = {}) {
    this.scrollbackBytes = scrollbackBytes
  }

  /** Adds a sandbox: reads its output from now on, and waits for its end. Throws SandboxError (SANDBOX_ID_DUPLICATE). */
  add(id: string, vm: Vm): void {
    if (this.#sandboxes.has(id)) {
      throw new SandboxError({
        code: "SANDBOX_ID_DUPLICATE",
        message: `there is a sandbox ${JSON.stringify(id)} already`,
        hint: "remove it first, or take another id"
      })
    }
    const scrollback = new Tail(this.scrollbackBytes)
    const listeners = new Set<OnOutputListener>()
    const follow = (source: OutputSource) => {
      const stream = vm[source]
      const listen = (bytes: Buffer | string) => {
        const chunk = typeof bytes === "string" ? Buffer.from(bytes) : bytes
        scrollback.push(chunk)
        for (const listener of [...listeners]) listener(chunk, source)
      }
      stream.on("data", listen)
      return () => void stream.off("data", listen)
    }
    const followed = vm.stderr === vm.stdout ? [follow("stdout")] : [follow("stdout"), follow("stderr")]
    const forget = () => {
      for (const leave of followed) leave()
      listeners.clear()
    }
    const sandbox: Sandbox<Vm> = {
      vm,
      addedAt: Date.now(),
      scrollback,
      listeners,
      forget,
      isEnded: false,
      ended: Promise.resolve()
    }
    this.#sandboxes.set(id, sandbox)
    sandbox.ended = waitForEnd(vm, () => this.#sandboxes.get(id) === sandbox).then(() => {
      sandbox.isEnded = true
    })
  }

  /** Removes a sandbox from the set. The VM keeps running. */
  remove(id: string): void {
    this.#sandboxes.get(id)?.forget()
    this.#sandboxes.delete(id)
  }

  /** The sandboxes, in the order in which they were added. */
  list(): Array<{ id: string; addedAt: number }> {
    return [...this.#sandboxes].map(([id, { addedAt }]) => ({ id, addedAt }))
  }

  get(id: string): SandboxEntry<Vm> | undefined {
    const sandbox = this.#sandboxes.get(id)
    if (sandbox === undefined) return undefined
    const { addedAt, scrollback, vm } = sandbox
    return { id, vm, scrollback: scrollback.bytes, addedAt }
  }

  /** Whether a sandbox has ended, and a promise that resolves when it does. */
  end(id: string): { readonly isEnded: boolean; readonly ended: Promise<void> } | undefined {
    return this.#sandboxes.get(id)
  }

  /** Writes to a sandbox's stdin. False: there is no such sandbox. */
  send(id: string, data: string | Uint8Array): boolean {
    const sandbox = this.#sandboxes.get(id)
    sandbox?.vm.stdin.write(data)
    return sandbox !== undefined
  }

  /** Calls the listener with every new chunk of output. The returned function ends that. */
  onOutput(id: string, listener: OnOutputListener): () => void {
    const sandbox = this.#sandboxes.get(id)
    if (sandbox === undefined) throw unknownSandbox(id)
    // a new function, because the same listener may be given twice
    const own: OnOutputListener = (chunk, source) => listener(chunk, source)
    sandbox.listeners.add(own)
    return () => void sandbox.listeners.delete(own)
  }
}

export const unknownSandbox = (id: string) =>
  new SandboxError({
    code: "SANDBOX_ID_UNKNOWN",
    message: `there is no sandbox ${JSON.stringify(id)}`,
    hint: "list() names those there are"
  })

/** Waits for a VM's end while `matters`. Repeats a `wait` that ends at its time limit (BOOT_TIMEOUT); any other failure counts as the end. */
const waitForEnd = async (vm: SandboxVm, isListed: () => boolean): Promise<void> => {
  while (isListed()) {
    try {
      await (vm.ended?.() ?? vm.wait())
      return
    } catch (error) {
      if (!isMachinenError(error) || error.code !== "BOOT_TIMEOUT") return
    }
  }
}
