import { randomBytes } from "node:crypto"
import * as path from "node:path"
import { afterAll, assert, layer } from "@effect/vitest"
import { Chunk, Effect, Option, Stream } from "effect"
import type { FilesError } from "../../src/errors.ts"
import { Guest, guest, settled, sh, sha256, temporaryHome, text } from "../fixtures.ts"

const home = temporaryHome()
afterAll(() => settled(home))

const mib = 2 ** 20

layer(guest(home, { memoryMib: 512, rootDiskSizeBytes: 4 * 2 ** 30 }), { excludeTestServices: true, timeout: 60_000 })(
  "files of micro",
  (it) => {
    it.effect("hold any bytes", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const bytes = randomBytes(5 * mib + 3)
        yield* vm.writeFile("/tmp/made/on/the/way/bytes", bytes)
        const back = Buffer.concat(
          Chunk.toReadonlyArray(yield* Stream.runCollect(vm.readFile("/tmp/made/on/the/way/bytes")))
        )
        assert.strictEqual(sha256(back), sha256(bytes))
        assert.include(yield* sh(vm, "sha256sum /tmp/made/on/the/way/bytes"), sha256(bytes))
        yield* vm.writeFile("/tmp/empty", "")
        assert.strictEqual((yield* vm.stat("/tmp/empty")).size, 0)
        assert.strictEqual(yield* Stream.runCount(vm.readFile("/tmp/empty")), 0)
      })
    )

    it.effect("have modes and can be appended to", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* vm.writeFile("/tmp/a", "one\n")
        assert.strictEqual((yield* vm.stat("/tmp/a")).mode & 0o7777, 0o644)
        yield* vm.writeFile("/tmp/a", "two\n", { append: true })
        assert.strictEqual(yield* sh(vm, "cat /tmp/a"), "one\ntwo")
        yield* vm.writeFile("/tmp/a", "three\n")
        assert.strictEqual(yield* sh(vm, "cat /tmp/a"), "three")
        yield* vm.writeFile("/tmp/script", "#!/bin/sh\necho ran\n", { mode: 0o700 })
        assert.strictEqual(yield* sh(vm, "/tmp/script"), "ran")
        assert.strictEqual((yield* vm.stat("/tmp/script")).mode & 0o7777, 0o700)
      })
    )

    const files: ReadonlyArray<
      readonly [what: string, use: (vm: Guest["Type"]) => Effect.Effect<unknown, { code: string }>, code: string]
    > = [
      ["a missing file", (vm) => Stream.runDrain(vm.readFile("/no/such/file")), "FILES_NOT_FOUND"],
      [
        "a missing directory, not made",
        (vm) => vm.writeFile("/no/dir/file", "x", { recursive: false }),
        "FILES_NOT_FOUND"
      ],
      ["a directory as a file", (vm) => vm.writeFile("/etc", "x"), "FILES_GUEST_IO"],
      ["a directory read", (vm) => Stream.runDrain(vm.readFile("/etc")), "FILES_GUEST_IO"],
      ["a relative path", (vm) => vm.writeFile("relative", "x"), "FILES_PATH_INVALID"],
      ["NUL in a path", (vm) => vm.writeFile("/tmp/a\0b", "x"), "FILES_PATH_INVALID"],
      ["nothing to push", (vm) => vm.push("/no/such/place/on/the/host", "/tmp/x"), "FILES_HOST_DIR_NOT_FOUND"],
      ["nothing to pull", (vm) => vm.pull("/no/such/place", path.join(home, "never")), "FILES_NOT_FOUND"]
    ]
    for (const [what, use, code] of files) {
      it.effect(`fail with a code: ${what}`, () =>
        Effect.gen(function* () {
          const vm = yield* Guest
          assert.strictEqual((yield* Effect.flip(use(vm))).code, code)
          assert.strictEqual(yield* sh(vm, "echo fine"), "fine")
        })
      )
    }
  }
)

layer(guest(home, { image: "debian", rootDiskSizeBytes: 4 * 2 ** 30 }), { excludeTestServices: true, timeout: 60_000 })(
  "files of debian",
  (it) => {
    it.effect("are listed, made, moved and removed", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* vm.makeDirectory("/srv/names/of/all", { mode: 0o700 })
        yield* vm.makeDirectory("/srv/names/of/all")
        yield* vm.writeFile("/srv/names/ä\nb", "12345")
        yield* sh(vm, "ln -s of /srv/names/link")
        const listed = yield* vm.list("/srv/names")
        assert.deepStrictEqual(
          listed.map(({ kind, name, size, target }) => [name, kind, kind === "file" ? size : 0, target]),
          [
            ["link", "symlink", 0, "of"],
            ["of", "directory", 0, undefined],
            ["ä\nb", "file", 5, undefined]
          ]
        )
        assert.strictEqual((yield* vm.stat("/srv/names/of/all")).mode, 0o700)
        yield* vm.rename("/srv/names/ä\nb", "/srv/names/of/moved")
        yield* vm.remove("/srv/names/link")
        assert.deepStrictEqual(
          (yield* vm.list("/srv/names")).map(({ name }) => name),
          ["of"]
        )

        const failures: ReadonlyArray<readonly [failing: Effect.Effect<unknown, FilesError>, code: string]> = [
          [vm.list("/srv/none"), "FILES_NOT_FOUND"],
          [vm.list("/etc/passwd"), "FILES_GUEST_IO"],
          [vm.list("relative"), "FILES_PATH_INVALID"],
          [vm.remove("/srv/none"), "FILES_NOT_FOUND"],
          [vm.remove("/srv/names"), "FILES_GUEST_IO"],
          [vm.remove("/", { recursive: true }), "FILES_PATH_INVALID"],
          [vm.remove("/srv/..", { recursive: true }), "FILES_PATH_INVALID"],
          [vm.rename("/srv/none", "/srv/other"), "FILES_NOT_FOUND"],
          [vm.makeDirectory("/srv/names", { recursive: false }), "FILES_GUEST_IO"],
          [vm.makeDirectory("/srv/a\0b"), "FILES_PATH_INVALID"]
        ]
        for (const [failing, code] of failures)
          assert.strictEqual((yield* Effect.flip(Effect.asVoid(failing))).code, code)

        yield* sh(vm, "mkdir /srv/kept; touch /srv/kept/file; ln -s /srv/kept /srv/names/of/way")
        yield* vm.remove("/srv/names", { recursive: true })
        assert.strictEqual(
          yield* sh(vm, "ls /srv/kept; ls -d /srv/names 2>&1 || true"),
          "file\nls: cannot access '/srv/names': No such file or directory"
        )
        yield* sh(vm, "mkdir /srv/crowd; cd /srv/crowd; seq -f %010g 20000 | xargs touch")
        assert.lengthOf(yield* vm.list("/srv/crowd"), 20_000)
      })
    )

    it.effect("whose names are not UTF-8 are listed, watched, read and removed by the names they are told with", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* sh(
          vm,
          `mkdir /srv/bytes; cd /srv/bytes; echo x >"$(printf 'a\\377b')"; ln -s "$(printf 'to\\200')" link`
        )
        const [first, second] = yield* vm.list("/srv/bytes")
        assert.deepStrictEqual([first?.name, second?.target], ["a\udcffb", "to\udc80"])
        const name = `/srv/bytes/${first?.name}`
        assert.strictEqual((yield* vm.stat(name)).size, 2)
        assert.strictEqual((yield* Stream.runCollect(vm.readFile(name))).length, 1)
        const told = yield* Effect.scoped(
          Effect.gen(function* () {
            const changes = yield* vm.watch("/srv/bytes")
            yield* vm.remove(name)
            return yield* Stream.runHead(changes)
          })
        )
        assert.deepStrictEqual(Option.getOrUndefined(told), { kind: "removed", path: "a\udcffb" })
        assert.strictEqual(yield* sh(vm, "ls /srv/bytes"), "link")
      })
    )

    it.effect("are read in parts, no more of them than is wanted", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        yield* vm.writeFile("/srv/digits", "0123456789")
        const part = (range: { offset?: number; length?: number }) =>
          Effect.map(Stream.runCollect(vm.readFile("/srv/digits", range)), (all) =>
            text(Buffer.concat(Chunk.toReadonlyArray(all)))
          )
        assert.strictEqual(yield* part({ offset: 3, length: 4 }), "3456")
        assert.strictEqual(yield* part({ offset: 8 }), "89")
        assert.strictEqual(yield* part({ length: 2 }), "01")
        assert.strictEqual(yield* part({ offset: 50 }), "")
        for (const range of [{ offset: -1 }, { length: 0.5 }, { offset: Number.NaN }]) {
          assert.strictEqual((yield* Effect.flip(part(range))).code, "FILES_RANGE_INVALID")
        }
        yield* sh(vm, "truncate -s 20G /srv/endless")
        const some = yield* Stream.runFold(
          Stream.take(vm.readFile("/srv/endless"), 3),
          0,
          (sum, { length }) => sum + length
        )
        assert.isAbove(some, 0)
        assert.strictEqual(yield* sh(vm, "rm /srv/endless; echo fine"), "fine")
      })
    )
  }
)
