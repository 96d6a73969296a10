import * as path from "node:path"
import { Args, Command, Options } from "@effect/cli"
import { FileSystem } from "@effect/platform"
import { Console, Effect, Option } from "effect"
import type { BuildProgress } from "../../boot/provision.ts"
import { ParseError } from "../../errors.ts"
import type { ImageConfig } from "../../image/ImageConfig.ts"
import { Machinen } from "../../Machinen.ts"
import type { Vm } from "../../vm/Vm.ts"
import { bootOptions, durationMs, environment, json, size, whenGiven, wholeNumber } from "../options.ts"
import * as render from "../render.ts"
import * as stdio from "../stdio.ts"

const recipePath = "/tmp/machinen-recipe"

/** A step of a build. Copies come before commands, as ADD before RUN in a Dockerfile. */
type Step =
  | { readonly _tag: "Copy"; readonly from: string; readonly to: string }
  | { readonly _tag: "Recipe"; readonly file: string; readonly script: boolean }
  | { readonly _tag: "Run"; readonly line: string }

const title = (step: Step): string =>
  step._tag === "Copy" ? `copy ${step.from} to ${step.to}` : step._tag === "Run" ? step.line : path.basename(step.file)

const show = ({ bytes }: { readonly bytes: Uint8Array }) => Effect.ignore(stdio.write("stderr")(bytes))

/** Performs a step in the guest. Its output goes to stderr, because stdout is for the result. */
const runStep = (vm: Vm, step: Step) => {
  const options = { keep: [], onOutput: show }
  switch (step._tag) {
    case "Copy":
      return Effect.asVoid(vm.push(step.from, step.to))
    case "Run":
      return Effect.asVoid(vm.exec(step.line, options))
    case "Recipe":
      return vm.push(step.file, recipePath).pipe(
        // a recipe without `#!` is run by `sh -e`, which ends at the first command that fails
        Effect.zipRight(vm.exec({ argv: ["chmod", "0755", recipePath] })),
        Effect.zipRight(vm.exec({ argv: step.script ? [recipePath] : ["sh", "-e", recipePath] }, options)),
        Effect.zipRight(vm.exec({ argv: ["rm", "-f", recipePath] })),
        Effect.asVoid
      )
  }
}

/** Parses a command as in a Dockerfile: a JSON array is the command itself, any other text is a line for the shell. */
const commandLine = (flag: string, text: string) =>
  Effect.gen(function* () {
    if (!text.trimStart().startsWith("[")) return ["sh", "-c", text] as const
    const parsed = yield* Effect.try(() => JSON.parse(text) as unknown).pipe(Effect.option)
    const words = Option.getOrElse(parsed, () => [])
    if (Array.isArray(words) && words.length > 0 && words.every((word): word is string => typeof word === "string")) {
      const [first = "", ...rest] = words
      return [first, ...rest] as const
    }
    return yield* new ParseError({
      code: "PARSE_FLAG_MALFORMED",
      message: `--${flag} ${JSON.stringify(text)} is not an array of strings`,
      hint: `--${flag} 'python3 app.py', or --${flag} '["python3", "app.py"]'`
    })
  })

const parseCopy = (text: string) => {
  const at = text.lastIndexOf(":/")
  return at > 0
    ? Effect.succeed({ _tag: "Copy" as const, from: path.resolve(text.slice(0, at)), to: text.slice(at + 1) })
    : new ParseError({
        code: "PARSE_FLAG_MALFORMED",
        message: `--copy ${JSON.stringify(text)} is not HOST:/GUEST`,
        hint: "--copy ./packages:/srv/packages"
      })
}

const text = (name: string, description: string) =>
  Options.text(name).pipe(Options.optional, Options.withDescription(description))

/** `machinen provision [RECIPE] --out FILE` (also `bake`): builds an image from a base and a recipe. */
export const provision = (name: "provision" | "bake") =>
  Command.make(
    name,
    {
      base: text("base", "what to build upon, as --image of run (default debian)"),
      out: Options.text("out").pipe(
        Options.withAlias("o"),
        Options.withDescription("the tarball to write: .tar.gz, or .tar for none of the packing")
      ),
      run: Options.text("run").pipe(
        Options.repeated,
        Options.withDescription("a line for the guest's shell, run as root; may be repeated")
      ),
      copy: Options.text("copy").pipe(
        Options.repeated,
        Options.withDescription("HOST:/GUEST: a file or directory, before anything is run; may be repeated")
      ),
      cmd: text("cmd", "the image's command: for the shell, or a JSON array"),
      entrypoint: text("entrypoint", "what comes before any command: for the shell, or a JSON array"),
      env: bootOptions.env,
      workdir: bootOptions.workdir,
      user: text("user", "whom the image's commands run as: user[:group]"),
      memory: bootOptions.memory,
      vcpus: bootOptions.vcpus,
      disk: text("disk", "what the build may write (default 8G)"),
      maxSize: text("max-size", "what the image may hold (default 16G)"),
      timeout: text("timeout", "end the build after this long (default 10m)"),
      epoch: text("epoch", "no file of the image is younger, in seconds since 1970 (default: SOURCE_DATE_EPOCH)"),
      noPrebake: Options.boolean("no-prebake").pipe(
        Options.withDescription("leave making it bootable to its first boot")
      ),
      json,
      recipe: Args.text({ name: "recipe" }).pipe(Args.optional, Args.withDescription("a script to run in the guest"))
    },
    (input) =>
      Effect.gen(function* () {
        const fs = yield* FileSystem.FileSystem
        const copies = yield* Effect.forEach(input.copy, parseCopy)
        const recipe = yield* Effect.transposeMapOption(input.recipe, (file) =>
          fs.readFile(file).pipe(
            Effect.mapError(
              (cause) =>
                new ParseError({
                  code: "PARSE_ARGUMENT_MISSING",
                  message: `the recipe ${file} cannot be read: ${cause.message}`,
                  hint: "give a shell script, or --run 'apt-get install -y jq'"
                })
            ),
            Effect.map((bytes) => ({
              _tag: "Recipe" as const,
              file: path.resolve(file),
              script: Buffer.from(bytes).toString("latin1").startsWith("#!")
            }))
          )
        )
        const steps: ReadonlyArray<Step> = [
          ...copies,
          ...Option.toArray(recipe),
          ...input.run.map((line) => ({ _tag: "Run" as const, line }))
        ]
        const given = yield* Effect.all({
          cmd: Effect.transposeMapOption(input.cmd, (value) => commandLine("cmd", value)),
          entrypoint: Effect.transposeMapOption(input.entrypoint, (value) => commandLine("entrypoint", value)),
          cwd: Effect.succeed(input.workdir),
          user: Effect.succeed(input.user)
        })
        const env = yield* environment(input.env)
        const config: ImageConfig = { ...whenGiven(given), ...(input.env.length === 0 ? {} : { env }) }
        const epoch = Option.orElse(input.epoch, () => Option.fromNullable(process.env["SOURCE_DATE_EPOCH"]))
        const options = yield* Effect.all({
          base: Effect.succeed(input.base),
          memoryMib: Effect.transposeMapOption(input.memory, (value) => wholeNumber("memory", value)),
          vcpus: Effect.transposeMapOption(input.vcpus, (value) => wholeNumber("vcpus", value)),
          diskSizeBytes: Effect.transposeMapOption(input.disk, (value) => size("disk", value)),
          maxImageBytes: Effect.transposeMapOption(input.maxSize, (value) => size("max-size", value)),
          timeoutMs: Effect.transposeMapOption(input.timeout, (value) => durationMs("timeout", value)),
          newest: Effect.transposeMapOption(epoch, (value) => wholeNumber("epoch", value))
        })
        const machinen = yield* Machinen
        const built = yield* machinen.provision({
          ...whenGiven(options),
          out: input.out,
          config,
          prebake: !input.noPrebake,
          onProgress: showProgress,
          install: (vm) =>
            Effect.forEach(
              steps,
              (step, i) =>
                Console.error(`▸ ${i + 1}/${steps.length} ${title(step)}`).pipe(
                  Effect.zipRight(runStep(vm, step)),
                  Effect.annotateLogs({ step: i + 1 })
                ),
              { discard: true }
            )
        })
        if (input.json) return yield* render.json({ ...built, phases: Object.fromEntries(built.phases) })
        yield* Console.log(built.imagePath)
        yield* Console.error(
          `built in ${(built.elapsedMs / 1000).toFixed(1)} s, ${render.bytes(built.sizeBytes)}, sha256 ${built.sha256}`
        )
      })
  ).pipe(
    Command.withDescription(
      name === "bake" ? "the same as provision" : "build an image: boot a base, run commands in it, save its files"
    )
  )

/** Shows progress on stderr. The number of saved bytes is shown on a terminal only, in one line that changes. */
const showProgress = (progress: BuildProgress): Effect.Effect<void> =>
  progress._tag === "Phase"
    ? Console.error(`… ${phases[progress.phase]}`)
    : process.stderr.isTTY
      ? Effect.ignore(stdio.write("stderr")(Buffer.from(`\r\x1b[K  ${render.bytes(progress.bytes)}\r`)))
      : Effect.void

const phases = {
  boot: "boot the base",
  install: "install",
  archive: "save the root filesystem",
  prebake: "make it bootable"
} as const
