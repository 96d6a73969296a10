/** Leaves out the properties that are `undefined`: optional properties must be absent then (exactOptionalPropertyTypes). */
export const given = <A extends object>(properties: A): Given<A> =>
  Object.fromEntries(Object.entries(properties).filter(([, value]) => value !== undefined)) as Given<A>

type Given<A> = { readonly [K in keyof A as undefined extends A[K] ? never : K]: A[K] } & {
  readonly [K in keyof A as undefined extends A[K] ? K : never]?: Exclude<A[K], undefined>
}
