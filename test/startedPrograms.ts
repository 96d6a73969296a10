/**
 * The names of host programs that the sources start, read from the sources: calls of Node's and Effect's process functions and of our own
 * functions that pass a command on to these, shell scripts and shell text, Rust's Command::new and Go's exec.Command. What a guest runs is
 * not looked at.
 */
import * as ts from "typescript"

/** The programs in the command positions of a POSIX or bash script. Functions it defines and builtins of the shell are left out. */
export const inShell = (script: string): ReadonlyArray<string> => {
  const found = new Set<string>()
  const functions = new Set<string>()
  /** Reads commands from `at` until `end` (a closing parenthesis or backquote) and gives the position after it. */
  const commands = (at: number, end: string): number => {
    let inCommand = false
    let ofCase = 0
    const heredocs: Array<string> = []
    while (at < script.length) {
      const char = script[at] ?? ""
      if (char === end && !(end === ")" && ofCase > 0 && !inCommand)) return at + 1
      if (char === "\n") {
        at++
        inCommand = false
        for (const mark of heredocs.splice(0)) {
          const rest = new RegExp(`^\\t*${mark.replaceAll(/[^\w]/g, "\\$&")}$`, "m").exec(script.slice(at))
          at = rest === null ? script.length : at + rest.index + rest[0].length
        }
      } else if (/\s/.test(char)) at++
      else if (char === "\\" && script[at + 1] === "\n") at += 2
      else if (char === "#") at = endOf("\n", at)
      else if (script.startsWith("<<<", at)) at += 3
      else if (script.startsWith("<<", at)) {
        const mark = /^<<-?\s*(['"]?)(\w+)\1/.exec(script.slice(at))
        if (mark !== null) heredocs.push(mark[2] ?? "")
        at += mark?.[0].length ?? 2
      } else if (/^(\d*[<>]|&>)/.test(script.slice(at)) && !/^[<>]\(/.test(script.slice(at))) {
        // a redirection and its target are no command
        at += /^(\d*[<>]{1,2}[&|]?|&>{1,2})[ \t]*/.exec(script.slice(at))?.[0].length ?? 1
        at = word(at).at
      } else if (script.startsWith(";;", at)) {
        at += 2
        inCommand = false
      } else if (";&|".includes(char)) {
        at++
        inCommand = false
      } else if (script.startsWith("((", at) && !inCommand) at = endOf("))", at)
      else if (script.startsWith("[[", at) && !inCommand) at = conditional(at + 2)
      else if (char === "(") {
        at = commands(at + 1, ")")
        inCommand = true
      } else if (char === ")") {
        at++ // of a pattern in `case`
        inCommand = false
      } else {
        const next = word(at)
        at = Math.max(next.at, at + 1)
        if (inCommand) continue
        if (script.slice(at).startsWith("()")) {
          functions.add(next.text)
          at += 2
        } else if (next.text === "case") {
          ofCase++
          at = endOf(" in", at)
        } else if (next.text === "esac") ofCase--
        else if (next.text === "for") {
          while (at < script.length && !/[;\n]/.test(script[at] ?? "")) at = Math.max(word(at).at, at + 1)
        } else if (next.text === "$") {
          // a variable, or an empty list of them: what follows may be the command
        } else if (keywords.has(next.text) || /^\w+(\[.*\])?\+?=/.test(next.text)) {
          // a command follows
        } else if (ofCase > 0 && /^[^\n]*?\)/.test(script.slice(at)) && patternEnds(at)) at = endOf(")", at)
        else {
          inCommand = true
          if (next.text === "exec" || next.text === "command") inCommand = /^\s*-/.test(script.slice(at))
          else if (/^(\/[\w/]+\/)?[a-z][\w.-]*$/.test(next.text)) found.add(next.text.replace(/^.*\//, ""))
        }
      }
    }
    return at
  }
  const patternEnds = (at: number) => /^[ \t]*(\|[^)\n]*)?\)/.test(script.slice(at))
  const endOf = (text: string, at: number) => {
    const found = script.indexOf(text, at)
    return found === -1 ? script.length : found + text.length
  }
  const conditional = (at: number): number => {
    while (at < script.length && !script.startsWith("]]", at)) {
      if (/[\s()<>|&]/.test(script[at] ?? "")) at++
      else at = Math.max(word(at).at, at + 1)
    }
    return at + 2
  }
  /** A word, whose substitutions are read as commands too. */
  const word = (at: number): { readonly at: number; readonly text: string } => {
    let text = ""
    while (at < script.length && !/[\s;&|()<>]/.test(script[at] ?? "")) {
      const char = script[at] ?? ""
      if (char === "\\") {
        text += script[at + 1] ?? ""
        at += 2
      } else if (char === "'") {
        const end = endOf("'", at + 1)
        text += script.slice(at + 1, end - 1)
        at = end
      } else if (char === '"') {
        at++
        while (at < script.length && script[at] !== '"') {
          const expanded = expansion(at)
          if (expanded !== at) {
            text += "$"
            at = expanded
          } else {
            if (script[at] === "\\") at++
            text += script[at] ?? ""
            at++
          }
        }
        at++
      } else {
        const expanded = expansion(at)
        text += expanded === at ? char : "$"
        at = Math.max(expanded, at + 1)
      }
      if (/^\w+\+?=$/.test(text) && script[at] === "(") at = commands(at + 1, ")") // a list, which may be run as a command
    }
    return { at, text }
  }
  const expansion = (at: number): number => {
    if (script.startsWith("$((", at)) return endOf("))", at)
    if (script.startsWith("$(", at)) return commands(at + 2, ")")
    if (script[at] === "`") return commands(at + 1, "`")
    if (script.startsWith("${", at)) return endOf("}", at)
    return script[at] === "$" ? at + (/^\$\w+|^\$./.exec(script.slice(at))?.[0].length ?? 1) : at
  }
  commands(0, "")
  return [...found].filter((name) => !functions.has(name) && !builtins.has(name))
}

const keywords = new Set(["!", "do", "done", "elif", "else", "fi", "if", "then", "time", "until", "while", "{", "}"])
const builtins = new Set(
  [
    ":",
    ".",
    "[",
    "alias",
    "break",
    "builtin",
    "cd",
    "continue",
    "declare",
    "echo",
    "eval",
    "exit",
    "export",
    "false",
    "getopts",
    "hash"
  ].concat(
    [
      "jobs",
      "kill",
      "let",
      "local",
      "mapfile",
      "printf",
      "pwd",
      "read",
      "readonly",
      "return",
      "select",
      "set",
      "shift",
      "shopt"
    ],
    ["source", "test", "trap", "true", "type", "typeset", "ulimit", "umask", "unset", "wait"]
  )
)

interface Source {
  readonly path: string
  readonly text: string
}

/** Functions that start a program, with the position of the argument that names it; `quick` and `long` are those of set-up's steps. */
const startersByName = { spawn: 0, spawnSync: 0, execFile: 0, execFileSync: 0, tool: 0, quick: 0, long: 1 }
const ofModules: Readonly<Record<string, ReadonlyArray<string>>> = {
  command: ["run"],
  streamCommand: ["run"],
  HostPty: ["spawn"],
  pty: ["spawn"]
}

/** Program names in TypeScript sources, each with the files that start it. */
export const inTypeScript = (sources: ReadonlyArray<Source>): ReadonlyMap<string, ReadonlySet<string>> => {
  const found = new Map<string, Set<string>>()
  for (const source of sources) {
    const file = ts.createSourceFile(source.path, source.text, ts.ScriptTarget.Latest, true)
    const add = (name: string) => found.set(name, (found.get(name) ?? new Set()).add(source.path))
    const starters = new Map<string, number>(Object.entries(startersByName))
    const constants = new Map<string, ts.Expression>()
    const calls: Array<ts.CallExpression> = []
    const functions: Array<readonly [name: string, ts.SignatureDeclaration & { readonly body?: ts.Node }]> = []
    const usesPlatformCommand = /import \{[^}]*\bCommand\b[^}]*\} from "@effect\/platform"/.test(source.text)

    const functionIn = (node: ts.Node): (ts.SignatureDeclaration & { readonly body?: ts.Node }) | undefined => {
      if (ts.isArrowFunction(node) || ts.isFunctionExpression(node)) return node
      // Effect.fn("name")(function* ...) and Effect.fnUntraced(function* ...)
      return ts.isCallExpression(node) && /^Effect\.fn/.test(node.expression.getText())
        ? node.arguments.map(functionIn).find((one) => one !== undefined)
        : undefined
    }
    const visit = (node: ts.Node): void => {
      if (ts.isCallExpression(node)) calls.push(node)
      if (ts.isVariableDeclaration(node) && ts.isIdentifier(node.name) && node.initializer !== undefined) {
        const made = functionIn(node.initializer)
        if (made === undefined) constants.set(node.name.text, node.initializer)
        else functions.push([node.name.text, made])
      }
      if (ts.isFunctionDeclaration(node) && node.name !== undefined) functions.push([node.name.text, node])
      ts.forEachChild(node, visit)
    }
    visit(file)

    const position = ({ expression }: ts.CallExpression): number | undefined => {
      if (ts.isIdentifier(expression)) return starters.get(expression.text)
      if (!ts.isPropertyAccessExpression(expression) || !ts.isIdentifier(expression.expression)) return undefined
      const [owner, method] = [expression.expression.text, expression.name.text]
      if (owner === "Command" && method === "make" && usesPlatformCommand) return 0
      return ofModules[owner]?.includes(method) === true ? 0 : undefined
    }
    /** The parameter that an argument is, or is taken from by `const [bin, ...args] = argv`. */
    const parameterOf = (
      argument: ts.Expression,
      of: ts.SignatureDeclaration & { readonly body?: ts.Node }
    ): number => {
      const direct = (name: string) =>
        of.parameters.findIndex(
          (parameter) =>
            (ts.isIdentifier(parameter.name) && parameter.name.text === name) ||
            (ts.isArrayBindingPattern(parameter.name) && firstOf(parameter.name) === name)
        )
      const names = headsOf(argument).flatMap(({ node }) => (ts.isIdentifier(node) ? [node.text] : []))
      for (const name of names) {
        if (direct(name) >= 0) return direct(name)
        let origin = -1
        const look = (node: ts.Node): void => {
          if (ts.isVariableDeclaration(node) && ts.isArrayBindingPattern(node.name) && firstOf(node.name) === name) {
            if (node.initializer !== undefined && ts.isIdentifier(node.initializer))
              origin = direct(node.initializer.text)
          }
          ts.forEachChild(node, look)
        }
        if (of.body !== undefined) look(of.body)
        if (origin >= 0) return origin
      }
      return -1
    }
    // a function that passes one of its own arguments on to a starter is one itself
    for (let known = -1; known !== starters.size; ) {
      known = starters.size
      for (const [name, made] of functions) {
        for (const call of calls) {
          if (!(call.pos >= made.pos && call.end <= made.end)) continue
          const at = position(call)
          const argument = at === undefined ? undefined : call.arguments[at]
          const parameter = argument === undefined ? -1 : parameterOf(argument, made)
          if (parameter >= 0 && !starters.has(name)) starters.set(name, parameter)
        }
      }
    }

    const textOf = (node: ts.Expression | undefined): string | undefined => {
      if (node === undefined) return undefined
      if (ts.isStringLiteralLike(node)) return node.text
      if (ts.isTemplateExpression(node)) {
        return node.head.text + node.templateSpans.map((span) => `$x${span.literal.text}`).join("")
      }
      if (ts.isIdentifier(node)) return textOf(constants.get(node.text))
      if (ts.isConditionalExpression(node)) return `${textOf(node.whenTrue) ?? ""}\n${textOf(node.whenFalse) ?? ""}`
      return undefined
    }
    /** Of a name its text; `sh -c` has its script read. */
    const command = (head: Head | undefined, known: ReadonlySet<string> = new Set()): void => {
      if (head === undefined) return
      if (ts.isIdentifier(head.node)) {
        const value = constants.get(head.node.text)
        if (value === undefined || known.has(head.node.text)) return
        const seen = new Set(known).add(head.node.text)
        for (const one of headsOf(value)) command({ ...one, rest: one.rest.length > 0 ? one.rest : head.rest }, seen)
        return
      }
      const name = (textOf(head.node) ?? "").replace(/^\/(usr\/)?s?bin\//, "")
      if (!/^[a-z][\w.+-]*$/.test(name)) return
      add(name)
      if (name !== "sh" && name !== "bash") return
      const at = head.rest.findIndex((word) => ts.isStringLiteralLike(word) && /^-\w*c$/.test(word.text))
      for (const program of inShell(at === -1 ? "" : (textOf(head.rest[at + 1]) ?? ""))) add(program)
    }
    for (const call of calls) {
      const at = position(call)
      if (at === undefined) continue
      const [argument, following] = [call.arguments[at], call.arguments[at + 1]]
      const rest = following !== undefined && ts.isArrayLiteralExpression(following) ? following.elements : []
      for (const head of argument === undefined ? [] : headsOf(argument)) {
        command(head.rest.length > 0 ? head : { ...head, rest })
      }
    }
  }
  return found
}

/** What stands where a command's name is expected, and the words after it. */
interface Head {
  readonly node: ts.Expression
  readonly rest: ReadonlyArray<ts.Expression>
}

/** The names that an expression may have as a command: itself, or the first of a list, also of one that a function makes from it. */
const headsOf = (node: ts.Expression): ReadonlyArray<Head> => {
  if (ts.isIdentifier(node) || ts.isStringLiteralLike(node)) return [{ node, rest: [] }]
  if (ts.isAsExpression(node) || ts.isParenthesizedExpression(node)) return headsOf(node.expression)
  if (ts.isConditionalExpression(node)) return [...headsOf(node.whenTrue), ...headsOf(node.whenFalse)]
  if (ts.isArrowFunction(node) && !ts.isBlock(node.body)) return headsOf(node.body)
  if (ts.isArrayLiteralExpression(node)) {
    const [first, ...rest] = node.elements
    if (first === undefined) return []
    return headsOf(ts.isSpreadElement(first) ? first.expression : first).map((head) => ({ node: head.node, rest }))
  }
  if (!ts.isCallExpression(node)) return []
  const callee = node.expression.getText()
  return ["join", "path.join", "path.resolve"].includes(callee) ? [] : node.arguments.flatMap(headsOf)
}

const firstOf = (pattern: ts.ArrayBindingPattern): string | undefined => {
  const [first] = pattern.elements
  return first !== undefined && ts.isBindingElement(first) && ts.isIdentifier(first.name) ? first.name.text : undefined
}

export const inRust = (text: string): ReadonlyArray<string> =>
  [...text.matchAll(/\bCommand::new\(\s*"([^"]+)"/g)].map(([, name = ""]) => name)

export const inGo = (text: string): ReadonlyArray<string> =>
  [...text.matchAll(/\bexec\.Command(?:Context\([^,]+,|\()\s*"([^"]+)"/g)].map(([, name = ""]) => name)
