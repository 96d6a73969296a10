import { execFileSync, spawn } from "node:child_process"
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { gunzipSync } from "node:zlib"
import { afterEach, assert, layer } from "@effect/vitest"
import { Effect, Fiber } from "effect"
import { ImageStore } from "../../src/image/ImageStore.ts"
import { RootfsImage } from "../../src/image/RootfsImage.ts"
import { Machinen } from "../../src/Machinen.ts"
import {
  assertNothingLeft,
  busyboxExt4,
  busyboxTarball,
  cli,
  eventually,
  live,
  newBundle,
  settled,
  sh,
  sha256,
  sha256OfFile,
  temporaryDirectory,
  temporaryHome
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

const umoci = (...args: ReadonlyArray<string>) => execFileSync("umoci", args, { stdio: ["ignore", "ignore", "pipe"] })

/** A tree of the host's static busybox. */
const busyboxTree = (dir: string): string => {
  const tree = path.join(dir, "tree")
  mkdirSync(path.join(tree, "bin"), { recursive: true })
  mkdirSync(path.join(tree, "etc"))
  execFileSync("cp", ["/bin/busybox", path.join(tree, "bin", "busybox")])
  for (const applet of ["sh", "cat", "echo", "ls", "id", "pwd", "stat"]) {
    execFileSync("ln", ["-sf", "busybox", path.join(tree, "bin", applet)])
  }
  return tree
}

/** An image as others make them: two layers, the second of which takes away and hides what the first has; an entrypoint; a user of its own. */
const ociLayout = (dir: string): string => {
  const layout = path.join(dir, "layout")
  const tree = busyboxTree(dir)
  mkdirSync(path.join(tree, "srv", "hidden"), { recursive: true })
  for (const name of ["gone", "kept", "hidden/old"]) writeFileSync(path.join(tree, "srv", name), `${name}\n`)
  writeFileSync(path.join(tree, "etc", "passwd"), "root:x:0:0::/root:/bin/sh\napp:x:77:78::/srv:/bin/sh\n")
  writeFileSync(path.join(tree, "etc", "group"), "root:x:0:\nextra:x:99:app\n")
  execFileSync("chown", ["77:78", path.join(tree, "srv", "kept")])
  umoci("init", "--layout", layout)
  umoci("new", "--image", `${layout}:v1`)
  umoci("insert", "--image", `${layout}:v1`, tree, "/")
  umoci("insert", "--image", `${layout}:v1`, "--whiteout", "/srv/gone")
  mkdirSync(path.join(dir, "fresh"))
  writeFileSync(path.join(dir, "fresh", "new"), "new\n")
  umoci("insert", "--image", `${layout}:v1`, "--opaque", path.join(dir, "fresh"), "/srv/hidden")
  const config = ["--config.entrypoint", "/bin/echo", "--config.entrypoint", "says", "--config.cmd", "default"]
  const more = [
    "--config.env",
    "COLOUR=red",
    "--config.env",
    "PATH=/bin",
    "--config.workingdir",
    "/srv",
    "--config.user",
    "app"
  ]
  umoci("config", "--image", `${layout}:v1`, ...config, ...more, "--config.exposedports", "80/tcp")
  return layout
}

const cache = { MACHINEN_CACHE_DIR: temporaryDirectory() }
const inCache = (): ReadonlyArray<string> => {
  const rootfs = path.join(cache.MACHINEN_CACHE_DIR, "rootfs")
  // lists of what was found out about files do not count
  return existsSync(rootfs)
    ? readdirSync(rootfs)
        .filter((file) => file !== "digests")
        .sort()
    : []
}
const dir = temporaryDirectory()
const layout = ociLayout(dir)

layer(live(home, cache), { excludeTestServices: true })("a container image", (it) => {
  it.effect("runs as docker would run it, from a layout, an archive and a registry", () =>
    Effect.gen(function* () {
      const run = (image: string, ...rest: ReadonlyArray<string>) =>
        cli(home, ["run", "--network", "none", "--image", image, ...rest], { env: cache })
      const said = yield* run(`oci:${layout}:v1`)
      assert.deepStrictEqual([said.code, said.stdout], [0, "says default\n"], said.stderr)
      const other = yield* run(`oci:${layout}`, "--", "something", "else")
      assert.strictEqual(other.stdout, "says something else\n")

      const archive = path.join(dir, "image.tar")
      execFileSync("skopeo", ["copy", "--quiet", `oci:${layout}:v1`, `docker-archive:${archive}:team/app:1`])
      const archived = yield* run(`docker-archive:${archive}`)
      assert.deepStrictEqual([archived.code, archived.stdout], [0, "says default\n"], archived.stderr)

      const { vm } = yield* (yield* Machinen).boot({ image: `oci:${layout}:v1`, network: "none" })
      assert.strictEqual(
        yield* sh(
          vm,
          "echo $COLOUR $PATH $PWD $HOME; id; ls -a /srv /srv/hidden; stat -c %u:%g /srv/kept; cat /dev/fd/0 </dev/null >/dev/stdout"
        ),
        "red /bin /srv /srv\nuid=77(app) gid=78 groups=78,99(extra)\n/srv:\n.\n..\nhidden\nkept\n\n/srv/hidden:\n.\n..\nnew\n77:78"
      )
      yield* vm.stop()
      const store = yield* ImageStore
      const [image] = (yield* store.list).filter(({ source }) => source === `oci:${layout}:v1`)
      const details = yield* store.inspect(image?.id ?? "")
      assert.deepStrictEqual(details.config.exposedPorts, ["80/tcp"])
      assert.deepStrictEqual(details.config.entrypoint, ["/bin/echo", "says"])
      // the same image by another way is the same
      assert.strictEqual(
        details.id,
        JSON.parse(readFileSync(path.join(layout, "index.json"), "utf8")).manifests[0].digest.slice(7)
      )
    }).pipe(Effect.scoped)
  )

  it.scoped("makes the working directory it names, if none of its layers has it", () =>
    Effect.gen(function* () {
      const workingDirectory = ["--tag", "nowhere", "--config.workingdir", "/not/there"]
      umoci("config", "--image", `${layout}:v1`, ...workingDirectory)
      const machinen = yield* Machinen
      const { vm } = yield* machinen.boot({ image: `oci:${layout}:nowhere`, network: "none" })
      assert.strictEqual(yield* sh(vm, "pwd; stat -c '%a %u:%g %F' ."), "/not/there\n755 0:0 directory")
      // one that the caller names is not
      const error = yield* Effect.flip(vm.execRaw({ argv: ["pwd"], cwd: "/nor/there" }))
      assert.strictEqual(error.code, "EXEC_CWD_INVALID")
    })
  )

  it.scoped("comes from a registry once, with layers kept by digest, until it is fetched again", () =>
    Effect.gen(function* () {
      const storage = path.join(dir, "registry")
      const port = 5000 + (process.pid % 1000)
      writeFileSync(
        path.join(dir, "registry.yml"),
        `version: 0.1\nstorage: {filesystem: {rootdirectory: ${storage}}}\nhttp: {addr: "127.0.0.1:${port}"}\n`
      )
      const registry = yield* Effect.acquireRelease(
        Effect.sync(() => spawn("docker-registry", ["serve", path.join(dir, "registry.yml")], { stdio: "ignore" })),
        (child) =>
          Effect.async<void>((resume) => {
            if (child.exitCode !== null) return resume(Effect.void)
            child.once("close", () => resume(Effect.void))
            child.kill()
          })
      )
      const answers = () => {
        try {
          execFileSync("bash", ["-c", `exec 3<>/dev/tcp/127.0.0.1/${port}`], { stdio: "ignore" })
          return true
        } catch {
          return false
        }
      }
      yield* eventually("the registry", answers)
      const name = `127.0.0.1:${port}/team/app:1`
      const push = (tag: string) =>
        execFileSync("skopeo", [
          "copy",
          "--quiet",
          "--dest-tls-verify=false",
          `oci:${layout}:${tag}`,
          `docker://${name}`
        ])
      push("v1")
      const first = yield* cli(home, ["run", "--network", "none", "--image", `docker://${name}`], { env: cache })
      assert.deepStrictEqual([first.code, first.stdout], [0, "says default\n"], first.stderr)
      const blobs = () => readdirSync(path.join(cache.MACHINEN_CACHE_DIR, "oci", "blobs", "sha256")).length

      // another configuration over the same layers: two small blobs more, and only when it is asked for
      execFileSync("umoci", ["config", "--image", `${layout}:v1`, "--tag", "v2", "--config.cmd", "changed"])
      push("v2")
      const again = yield* cli(home, ["run", "--network", "none", "--image", `docker://${name}`], { env: cache })
      assert.strictEqual(again.stdout, "says default\n")
      const before = blobs()
      const fetched = yield* cli(home, ["image", "import", `docker://${name}`, "--name", "fetched"], { env: cache })
      assert.strictEqual(fetched.code, 0, fetched.stderr)
      assert.strictEqual(blobs(), before + 2)
      const changed = yield* cli(home, ["run", "--network", "none", "--image", "fetched"], { env: cache })
      assert.strictEqual(changed.stdout, "says changed\n")

      const missing = yield* cli(home, ["run", "--image", `docker://127.0.0.1:${port}/no/such:1`], { env: cache })
      assert.strictEqual(missing.code, 125)
      assert.include(missing.stderr, "(IMAGE_PULL_FAILED)")
      registry.kill()
    })
  )

  /** The layout with one thing about it changed. */
  const altered = (name: string, change: (layout: string) => void): string => {
    const copy = path.join(dir, name)
    cpSync(layout, copy, { recursive: true })
    change(copy)
    return `oci:${copy}:v1`
  }
  const manifestOf = (at: string) => {
    const index = JSON.parse(readFileSync(path.join(at, "index.json"), "utf8"))
    const entry = index.manifests.find((m: { annotations: Record<string, string> }) =>
      Object.values(m.annotations).includes("v1")
    )
    const file = (digest: string) => path.join(at, "blobs", "sha256", digest.slice(7))
    return { index, entry, file, manifest: JSON.parse(readFileSync(file(entry.digest), "utf8")) }
  }
  /** Puts a document in the place of the manifest, with its right digest. */
  const withManifest = (
    at: string,
    edit: (manifest: { config: { mediaType: string }; layers: Array<{ mediaType: string }> }) => void
  ) => {
    const { entry, file, index, manifest } = manifestOf(at)
    edit(manifest)
    const text = JSON.stringify(manifest)
    entry.digest = `sha256:${sha256(Buffer.from(text))}`
    entry.size = text.length
    writeFileSync(file(entry.digest), text)
    writeFileSync(path.join(at, "index.json"), JSON.stringify(index))
  }
  it.effect("whose layers are packed by zstd runs as any other", () =>
    Effect.gen(function* () {
      const image = altered("zstd", (at) =>
        withManifest(at, ({ layers }) => {
          for (const layer of layers as Array<{ mediaType: string; digest: string; size: number }>) {
            const file = (digest: string) => path.join(at, "blobs", "sha256", digest.slice(7))
            const packed = execFileSync("zstd", ["-qc"], {
              input: gunzipSync(readFileSync(file(layer.digest))),
              maxBuffer: 2 ** 26
            })
            layer.mediaType = "application/vnd.oci.image.layer.v1.tar+zstd"
            layer.digest = `sha256:${sha256(packed)}`
            layer.size = packed.length
            writeFileSync(file(layer.digest), packed)
          }
        })
      )
      const { vm } = yield* (yield* Machinen).boot({ image, network: "none" })
      assert.strictEqual(yield* sh(vm, "cat /srv/hidden/new /srv/kept; ls /srv"), "new\nkept\nhidden\nkept")
      yield* vm.stop()
    }).pipe(Effect.scoped)
  )

  const broken: ReadonlyArray<readonly [string, string, (at: string) => void]> = [
    ["is not there", "IMAGE_NOT_FOUND", (at) => rmSync(at, { recursive: true })],
    ["has an index that makes no sense", "IMAGE_INVALID", (at) => writeFileSync(path.join(at, "index.json"), "{}")],
    [
      "has a manifest that is not its digest's",
      "IMAGE_INVALID",
      (at) => {
        const { entry, file } = manifestOf(at)
        writeFileSync(file(entry.digest), `${readFileSync(file(entry.digest), "utf8")} `)
      }
    ],
    [
      "has a layer that is not its digest's",
      "IMAGE_INVALID",
      (at) => {
        withManifest(at, (m) => void Object.assign(m, { annotations: { other: "one" } }))
        const { file, manifest } = manifestOf(at)
        // another image than the one that is there already
        const other = path.join(at, "other.tar.gz")
        execFileSync("sh", ["-c", `echo other >"${at}/x"; tar -C "${at}" -czf "${other}" x`])
        cpSync(other, file(manifest.layers[0].digest))
      }
    ],
    [
      "has a layer of an unknown type",
      "IMAGE_INVALID",
      (at) =>
        withManifest(at, (m) => {
          for (const l of m.layers) l.mediaType = "application/x-surprise"
        })
    ],
    [
      "has a configuration of an unknown type",
      "IMAGE_INVALID",
      (at) =>
        withManifest(at, (m) => {
          m.config.mediaType = "text/plain"
        })
    ],
    [
      "has a layer that is missing",
      "IMAGE_INVALID",
      (at) => {
        withManifest(at, (m) => void Object.assign(m, { annotations: { other: "two" } }))
        const { file, manifest } = manifestOf(at)
        rmSync(file(manifest.layers[1].digest))
      }
    ]
  ]
  for (const [what, code, change] of broken) {
    it.effect(`that ${what} is refused and leaves nothing`, () =>
      Effect.gen(function* () {
        const images = yield* RootfsImage
        const before = inCache()
        const error = yield* Effect.flip(images.resolve(altered(what.replaceAll(/[^a-z]/g, "-"), change)))
        assert.strictEqual(error.code, code, error.message)
        assert.deepStrictEqual(inCache(), before)
      })
    )
  }
})

layer(live(home, { ...cache, MACHINEN_IMAGE_LIMIT_MIB: "1" }), { excludeTestServices: true })(
  "beyond the limit",
  (it) => {
    for (const [what, image] of [
      ["a container image", `oci:${layout}:v1`],
      ["a tarball", busyboxTarball(dir, "large")]
    ] as const) {
      it.effect(`${what} is refused`, () =>
        Effect.gen(function* () {
          const images = yield* RootfsImage
          rmSync(path.join(cache.MACHINEN_CACHE_DIR, "rootfs"), { recursive: true, force: true })
          const error = yield* Effect.flip(images.resolve(image))
          assert.strictEqual(error.code, "ROOTFS_IMG_TOO_LARGE")
          assert.deepStrictEqual(
            readdirSync(path.join(cache.MACHINEN_CACHE_DIR, "rootfs")).filter((file) => file.includes("img")),
            []
          )
        })
      )
    }
  }
)

layer(live(home, cache), { excludeTestServices: true })("a tarball", (it) => {
  const hostile: ReadonlyArray<readonly [string, string]> = [
    [
      "with a name that leads out",
      `mkdir d; echo x >y; tar -cPf "$1" d/../../y 2>/dev/null || { mkdir -p d/e; cd d/e; tar -cPf "$1" ../../y; }`
    ],
    [
      "that writes through its own symlink",
      `mkdir a; echo x >a/y; tar -cf "$1" a/y; rm -r a; ln -s "$2" a; tar -cf "$1.l" a; tar -Af "$1.l" "$1"; mv "$1.l" "$1"`
    ],
    [
      "that is cut short",
      `mkdir d; head -c 200000 /dev/urandom >d/x; tar -czf "$1.w" d; head -c 100000 "$1.w" >"$1"; rm "$1.w"`
    ],
    ["that is no tarball", `head -c 5000 /dev/urandom >"$1"`]
  ]
  for (const [what, script] of hostile) {
    it.effect(`${what} is refused and writes nowhere else`, () =>
      Effect.gen(function* () {
        const images = yield* RootfsImage
        const work = temporaryDirectory()
        const outside = temporaryDirectory()
        const tarball = path.join(outside, "..", `${path.basename(outside)}.tar`)
        execFileSync("sh", ["-ec", script, "sh", tarball, outside], { cwd: work })
        const error = yield* Effect.flip(images.ensure(tarball))
        assert.strictEqual(error.code, "IMAGE_INVALID", error.message)
        assert.deepStrictEqual(readdirSync(outside), [])
        assert.isEmpty(
          readdirSync(path.join(cache.MACHINEN_CACHE_DIR, "rootfs")).filter((f) => f.endsWith(".building"))
        )
      })
    )
  }
})

layer(live(home, cache), { excludeTestServices: true })("the image store", (it) => {
  it.effect("names, lists, describes, exports and removes images", () =>
    Effect.gen(function* () {
      const machinen = (...args: ReadonlyArray<string>) => cli(home, ["image", ...args], { env: cache })
      const tarball = busyboxTarball(dir, "stored")
      const first = yield* machinen("import", tarball, "--name", "team/one", "--name", "two:1.0")
      assert.strictEqual(first.code, 0, first.stderr)
      const id = first.stdout.trim()
      assert.strictEqual(id, sha256OfFile(tarball))
      const ext4 = busyboxExt4(dir, "disk")
      const second = yield* machinen("import", ext4, "--name", "disk", "--json")
      assert.deepStrictEqual(JSON.parse(second.stdout).names, ["disk:latest"])
      rmSync(tarball)
      rmSync(ext4)
      for (const reference of ["team/one", "team/one:latest", "two:1.0", id, id.slice(0, 12), "disk"]) {
        const ran = yield* cli(home, ["run", "--network", "none", "--image", reference, "--", "cat", "/etc/mark"], {
          env: cache
        })
        assert.strictEqual(ran.stdout, reference === "disk" ? "disk\n" : "stored\n", ran.stderr)
      }
      const listed = JSON.parse((yield* machinen("ls", "--json")).stdout)
      assert.deepStrictEqual(
        listed.bases.map(({ name }: { name: string }) => name),
        ["micro", "debian"]
      )
      const one = listed.images.find((image: { id: string }) => image.id === id)
      assert.deepStrictEqual([one.names, one.source, one.vms], [["team/one:latest", "two:1.0"], tarball, []])
      assert.isAbove(Date.parse(one.lastUsedAt), Date.now() - 60_000)
      assert.include((yield* machinen("ls")).stdout, "team/one:latest two:1.0")
      assert.match((yield* machinen("inspect", "debian")).stdout, /^base-files [0-9]/m)
      assert.include((yield* machinen("inspect", id)).stdout, id)

      const out = path.join(dir, "exported.tar")
      const exported = yield* machinen("export", "two:1.0", out)
      assert.strictEqual(exported.code, 0, exported.stderr)
      assert.strictEqual(execFileSync("tar", ["-xOf", out, "etc/mark"]).toString(), "stored\n")

      assert.strictEqual((yield* machinen("tag", "disk", "three")).code, 0)
      const removed = JSON.parse((yield* machinen("rm", "two:1.0", "disk", "--json")).stdout)
      assert.deepStrictEqual(
        removed.map((each: { removed: boolean }) => each.removed),
        [false, false]
      )
      assert.strictEqual((yield* machinen("rm", "three")).code, 0)
      const without = yield* machinen("rm")
      assert.strictEqual(without.code, 2)
      assert.include(without.stderr, "(PARSE_ARGUMENT_MISSING)")
      for (const [args, code] of [
        [["rm", "three"], "IMAGE_NOT_FOUND"],
        [["inspect", "none/such"], "IMAGE_NOT_FOUND"],
        [["tag", "team/one", "Wrong"], "IMAGE_NAME_INVALID"],
        [["tag", "team/one", "micro"], "IMAGE_NAME_INVALID"],
        [["tag", "team/one", "../../x"], "IMAGE_NAME_INVALID"],
        [["tag", "team/one", "abcdef"], "IMAGE_NAME_INVALID"],
        [["import", "/nowhere"], "BOOT_IMAGE_NOT_FOUND"]
      ] as const) {
        const refused = yield* machinen(...args)
        assert.strictEqual(refused.code, 1)
        assert.include(refused.stderr, `(${code})`)
      }
      assertNothingLeft(home)
    })
  )

  it.scoped("does not remove what a VM runs from, or a snapshot needs", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const store = yield* ImageStore
      const { id, path: image } = yield* store.add(busyboxTarball(dir, "used"), ["used"])
      const { vm } = yield* machinen.boot({ image: "used", name: "user", network: "none" })
      const error = yield* Effect.flip(store.remove("used"))
      assert.strictEqual(error.code, "IMAGE_IN_USE")
      assert.include(error.message, "the VM user")
      assert.deepStrictEqual((yield* store.inspect("used")).vms, ["user"])

      const bundle = newBundle()
      yield* Effect.asVoid(machinen.snapshot(vm, { outDir: bundle }))
      const needed = yield* Effect.flip(store.remove(id))
      assert.include(needed.message, bundle)
      assert.deepStrictEqual((yield* store.inspect("used")).bundles, [bundle])
      const again = yield* machinen.restore({ snapDir: bundle })
      assert.strictEqual(yield* sh(again.vm, "cat /etc/mark"), "used")
      yield* again.vm.stop()
      rmSync(bundle, { recursive: true })
      assert.isTrue((yield* store.remove(id)).removed)
      assert.isFalse(existsSync(image))
      assert.strictEqual((yield* Effect.flip(store.inspect("used"))).code, "IMAGE_NOT_FOUND")
    })
  )

  it.scoped("collects what has no name and no use, and what is booted meanwhile is there", () =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const store = yield* ImageStore
      const nameless = busyboxTarball(dir, "nameless")
      const { id } = yield* store.add(nameless, [])
      yield* store.add(busyboxTarball(dir, "named"), ["named"])
      assert.deepStrictEqual(yield* store.gc({ dryRun: false, unusedForMs: 3_600_000 }), [])
      const due = yield* store.gc({ dryRun: true, unusedForMs: 0 })
      assert.include(
        due.map((image) => image.id),
        id
      )
      assert.isTrue((yield* store.list).some((image) => image.id === id))

      // removed and booted again and again at the same time: every boot has its image
      const collecting = yield* Effect.fork(
        Effect.forever(Effect.delay(store.gc({ dryRun: false, unusedForMs: 0 }), "5 millis"))
      )
      for (let turn = 0; turn < 4; turn++) {
        yield* Effect.scoped(
          Effect.gen(function* () {
            const { vm } = yield* machinen.boot({ image: nameless, network: "none" })
            assert.strictEqual(yield* sh(vm, "cat /etc/mark"), "nameless")
          })
        )
      }
      yield* Fiber.interrupt(collecting)
      // with an image go the layers that no other has
      const archive = path.join(dir, "collected.tar")
      execFileSync("skopeo", ["copy", "--quiet", `oci:${layout}:v1`, `docker-archive:${archive}:x:1`])
      yield* store.add(`docker-archive:${archive}`, [])
      const blobs = path.join(cache.MACHINEN_CACHE_DIR, "oci", "blobs", "sha256")
      const before = readdirSync(blobs)
      assert.isAbove(before.length, 4)
      yield* store.gc({ dryRun: false, unusedForMs: 0 })
      const kept = (yield* store.list).filter(({ source }) => source.startsWith("docker")).map((image) => image.id)
      const after = readdirSync(blobs)
      assert.isBelow(after.length, before.length)
      assert.includeMembers(after, kept)
      // a manifest, its configuration and its layers, each once
      const needed = kept.flatMap((id) => {
        const { config, layers } = JSON.parse(readFileSync(path.join(blobs, id), "utf8"))
        return [id, ...[config, ...layers].map(({ digest }: { digest: string }) => digest.slice(7))]
      })
      assert.deepStrictEqual(after.sort(), [...new Set(needed)].sort())
      const left = yield* store.list
      assert.isFalse(left.some((image) => image.id === id))
      assert.isTrue(left.some(({ names }) => names.includes("named:latest")))
      assert.isTrue(statSync(left[0]?.path ?? "").size > 0)
    })
  )
})
