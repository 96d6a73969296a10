import { PassThrough } from "node:stream"
import { assert, describe, it } from "@effect/vitest"
import { BootError, isMachinenError, Sandboxes, type SandboxVm, Supervisor } from "../../../src/promise.ts"

const codeOf = (f: () => unknown) => {
  try {
    f()
  } catch (error) {
    return isMachinenError(error) ? error.code : error
  }
  return undefined
}
const settle = () => new Promise((resolve) => setImmediate(resolve))

/** Something with streams, that tells what it is told. */
const sandbox = () => {
  const streams = { stdin: new PassThrough(), stdout: new PassThrough(), stderr: new PassThrough() }
  const sizes: Array<readonly [number, number]> = []
  const typed: Array<Buffer> = []
  streams.stdin.on("data", (chunk) => typed.push(chunk))
  let waits = 0
  let end = () => {}
  const ended = new Promise<void>((resolve) => {
    end = resolve
  })
  const vm: SandboxVm = {
    ...streams,
    resize: (cols, rows) => void sizes.push([cols, rows]),
    wait: () => {
      waits += 1
      return waits === 1 ? Promise.reject(new BootError({ code: "BOOT_TIMEOUT", message: "not yet" })) : ended
    }
  }
  return { vm, sizes, typed: () => Buffer.concat(typed), end: () => end() }
}

/** A terminal, as far as a supervisor sees one. */
const terminal = () => {
  const modes: Array<boolean> = []
  const input = Object.assign(new PassThrough(), {
    isTTY: true,
    isRaw: false,
    setRawMode: (raw: boolean) => {
      input.isRaw = raw
      modes.push(raw)
    }
  })
  const output = Object.assign(new PassThrough(), { isTTY: true, columns: 90, rows: 33 })
  const shown: Array<Buffer> = []
  output.on("data", (chunk) => shown.push(chunk))
  return { input, output, modes, shown: () => Buffer.concat(shown).toString() }
}

const supervised = (options: { readonly commandPrefix?: string } = {}) => {
  const sandboxes = new Sandboxes()
  const [one, two] = [sandbox(), sandbox()]
  sandboxes.add("one", one.vm)
  sandboxes.add("two", two.vm)
  const tty = terminal()
  const supervisor = new Supervisor({ sandboxes, input: tty.input, output: tty.output, ...options })
  const running = supervisor.run()
  const type = async (text: string | Buffer) => {
    tty.input.write(text)
    await settle()
  }
  return { sandboxes, one, two, supervisor, running, type, ...tty }
}

describe("sandboxes", () => {
  it("are added once, listed in order and forgotten", () => {
    const sandboxes = new Sandboxes()
    const { vm } = sandbox()
    sandboxes.add("b", vm)
    sandboxes.add("a", vm)
    assert.strictEqual(sandboxes.scrollbackBytes, 65_536)
    assert.deepStrictEqual(
      sandboxes.list().map(({ id }) => id),
      ["b", "a"]
    )
    assert.strictEqual(
      codeOf(() => sandboxes.add("a", vm)),
      "SANDBOX_ID_DUPLICATE"
    )
    assert.strictEqual(sandboxes.get("a")?.vm, vm)
    sandboxes.remove("a")
    sandboxes.remove("unknown")
    assert.isUndefined(sandboxes.get("a"))
    assert.lengthOf(sandboxes.list(), 1)
  })

  it("keep the newest bytes of both streams in the order they came", async () => {
    const sandboxes = new Sandboxes({ scrollbackBytes: 8 })
    const { vm } = sandbox()
    sandboxes.add("a", vm)
    for (const [stream, text] of [
      ["stdout", "one"],
      ["stderr", "two"],
      ["stdout", "three"]
    ] as const) {
      ;(vm[stream] as PassThrough).write(text)
      await settle()
    }
    assert.strictEqual(sandboxes.get("a")?.scrollback.toString(), "twothree")
    ;(vm.stdout as PassThrough).write("longer than the ring")
    await settle()
    assert.strictEqual(sandboxes.get("a")?.scrollback.toString(), "the ring")
  })

  it("are written to, and pass on new output until the listener is removed", async () => {
    const sandboxes = new Sandboxes()
    const { typed, vm } = sandbox()
    const stdout = vm.stdout as PassThrough
    sandboxes.add("a", vm)
    stdout.write("before")
    await settle()
    const seen: Array<string> = []
    const leave = sandboxes.onOutput("a", (chunk, source) => seen.push(`${source}: ${chunk}`))
    stdout.write("x")
    await settle()
    ;(vm.stderr as PassThrough).write("y")
    await settle()
    leave()
    stdout.write("z")
    await settle()
    assert.deepStrictEqual(seen, ["stdout: x", "stderr: y"])
    assert.isTrue(sandboxes.send("a", "in"))
    assert.isTrue(sandboxes.send("a", Buffer.from([0, 255])))
    assert.isFalse(sandboxes.send("b", "in"))
    await settle()
    assert.strictEqual(typed().toString("latin1"), "in\0\xff")
    assert.strictEqual(
      codeOf(() => sandboxes.onOutput("b", () => {})),
      "SANDBOX_ID_UNKNOWN"
    )
  })

  it("are waited for beyond the time limit of their own wait", async () => {
    const { vm } = sandbox()
    let waits = 0
    const wait = () => {
      waits += 1
      return Promise.reject(new BootError({ code: "BOOT_TIMEOUT", message: "not yet" }))
    }
    const sandboxes = new Sandboxes()
    sandboxes.add("one", { ...vm, wait, ended: () => Promise.resolve() })
    await sandboxes.end("one")?.ended
    assert.strictEqual(waits, 0)
  })

  it("with one stream for both are heard once", async () => {
    const sandboxes = new Sandboxes()
    const { vm } = sandbox()
    sandboxes.add("a", { ...vm, stderr: vm.stdout })
    ;(vm.stdout as PassThrough).write("once")
    await settle()
    assert.strictEqual(sandboxes.get("a")?.scrollback.toString(), "once")
  })
})

describe("a supervisor", () => {
  for (const prefix of ["/", "::"]) {
    it(`obeys commands that begin with ${prefix}`, async () => {
      const { running, shown, two, type } = supervised({ commandPrefix: prefix })
      await type(`${prefix}ls\n${prefix}help\n${prefix}nope\ntext\n${prefix}attach three\n`)
      const text = shown()
      assert.match(text, /^one {2}running {2}0s\r\ntwo {2}running/)
      for (const command of ["ls", "attach <id>", "help", "quit"]) assert.include(text, `${prefix}${command} `)
      assert.include(text, `there is no command ${prefix}nope`)
      assert.include(text, `nothing is attached: ${prefix}help`)
      assert.include(text, 'there is no sandbox "three"')
      two.end()
      await settle()
      await type(`${prefix}l`)
      await type(`s\r\n`)
      assert.include(shown(), "two  ended")
      await type(`${prefix}quit\n`)
      await running
    })
  }

  it("attaches: what was shown, what comes, what is typed, byte for byte, until ctrl-] twice", async () => {
    const { modes, one, shown, supervisor, type } = supervised()
    const stdout = one.vm.stdout as PassThrough
    stdout.write("earlier ")
    await settle()
    await type("/attach one\n")
    stdout.write("later")
    await settle()
    assert.strictEqual(shown(), "earlier later")
    assert.deepStrictEqual(modes, [true])
    await type(Buffer.from([0, 255, 3, 0x1d]))
    await type(Buffer.from([65, 0x1d]))
    await type(Buffer.concat([Buffer.from([0x1d]), Buffer.from("/help\n")]))
    assert.deepStrictEqual([...one.typed()], [0, 255, 3, 0x1d, 65])
    assert.deepStrictEqual(modes, [true, false])
    assert.include(shown(), "list the commands")
    stdout.write("unseen")
    await settle()
    assert.notInclude(shown(), "unseen")
    supervisor.detach()
    assert.deepStrictEqual(modes, [true, false])
    assert.strictEqual(
      codeOf(() => supervisor.attach("three")),
      "SANDBOX_ID_UNKNOWN"
    )
  })

  it("tells the one that is attached, and no other, of the terminal's size", async () => {
    const { one, output, supervisor, two } = supervised()
    output.emit("resize")
    supervisor.attach("one")
    output.columns = 100
    output.emit("resize")
    supervisor.attach("two")
    output.columns = 110
    output.emit("resize")
    supervisor.detach()
    output.emit("resize")
    assert.deepStrictEqual(one.sizes, [
      [90, 33],
      [100, 33]
    ])
    assert.deepStrictEqual(two.sizes, [
      [100, 33],
      [110, 33]
    ])
    assert.strictEqual(output.listenerCount("resize"), 0)
  })

  it("leaves one that ends, and says so", async () => {
    const { modes, one, shown, supervisor } = supervised()
    supervisor.attach("one")
    one.end()
    await settle()
    assert.include(shown(), "sandbox one has ended")
    assert.deepStrictEqual(modes, [true, false])
  })

  it("gives the terminal back when it is stopped and when its input ends, and can run again", async () => {
    const { input, modes, one, running, supervisor } = supervised()
    supervisor.attach("one")
    supervisor.stop()
    await running
    assert.deepStrictEqual(modes, [true, false])
    assert.strictEqual(input.listenerCount("data"), 0)

    const again = supervisor.run()
    supervisor.attach("one")
    input.end()
    await again
    assert.deepStrictEqual(modes, [true, false, true, false])
    assert.isFalse(one.vm.stdin.destroyed)
  })
})
