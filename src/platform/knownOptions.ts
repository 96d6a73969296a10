/** The names of an operation's options. The compiler reports a list that lacks an option of the type. */
export type OptionNames<Options> = Readonly<Record<keyof Options, true>>

/**
 * The first option that the operation does not know, if there is one: a misspelt option would be ignored silently otherwise. Options that are
 * `undefined` do not count.
 */
export const unknownOption = <Options extends object>(options: Options, known: OptionNames<Options>) =>
  Object.entries(options).find(([name, value]) => value !== undefined && !Object.hasOwn(known, name))?.[0]

/** Message and hint of the error about an unknown option. */
export const unknownOptionText = (operation: string, name: string, known: object) => ({
  message: `${operation} has no option "${name}"`,
  hint: `its options are: ${Object.keys(known).join(", ")}`
})
