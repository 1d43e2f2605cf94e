//! What `dom0-proto` declares, read from its sources, so that nothing in it escapes the comparison.
//!
//! The tables that are compared ([`galvan_dom0_proto::layout`]) are made by the crate's declaring
//! macros and listed by hand. Here the sources themselves are parsed: every constant, structure,
//! enumeration and union, in and outside those macros.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use syn::parse::{Parse, ParseStream};
use syn::{Attribute, Ident, Item as Syntax, Lit, Token, Type, braced, bracketed, parenthesized};

/// The macros of the crate that declare nothing public.
const DECLARE_NOTHING: &[&str] = &["payload_methods", "compat", "handle_traits"];
/// The macros that the crate defines: a new one may declare items, and has to be known here.
const DEFINED: &[&str] = &[
    "abi_consts",
    "abi_newtype",
    "abi_structs",
    "c_name",
    "versions",
    "payload_methods",
    "compat",
    "handle_traits",
];

/// One thing that the crate declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its path in the crate: `domctl::XEN_DOMCTL_CREATEDOMAIN`, `errno::Errno::EPERM`.
    pub path: String,
    /// Whether a macro declares it that also puts it in a table.
    pub tabled: bool,
}

/// Everything that the crate whose sources are in `src` declares.
pub fn of_crate(src: &Path) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut names: Vec<_> = fs::read_dir(src)
        .with_context(|| format!("cannot read {}", src.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    for entry in names {
        let path = entry.path();
        let Some(module) = path.file_stem().and_then(|s| s.to_str()) else {
            bail!("{} is no module", path.display());
        };
        if path.extension().is_none_or(|e| e != "rs") {
            bail!(
                "{}: modules in directories are not known here",
                path.display()
            );
        }
        let text = fs::read_to_string(&path)?;
        items.extend(of_module(module, &text).with_context(|| path.display().to_string())?);
    }
    Ok(items)
}

/// Everything that one module declares.
pub fn of_module(module: &str, text: &str) -> Result<Vec<Item>> {
    let mut found = Vec::new();
    let module = if module == "lib" { "" } else { module };
    walk(module, syn::parse_file(text)?.items, &mut found)?;
    Ok(found)
}

fn walk(module: &str, syntax: Vec<Syntax>, found: &mut Vec<Item>) -> Result<()> {
    let path = |name: &dyn std::fmt::Display| match module {
        "" => name.to_string(),
        _ => format!("{module}::{name}"),
    };
    let mut add = |path: String, tabled: bool| found.push(Item { path, tabled });
    for item in syntax {
        match item {
            // `const _` asserts; a private constant is no part of the ABI.
            Syntax::Const(c) if c.ident != "_" && is_public(&c.vis) => add(path(&c.ident), false),
            Syntax::Static(s) if is_public(&s.vis) => add(path(&s.ident), false),
            Syntax::Struct(s) if is_public(&s.vis) => add(path(&s.ident), false),
            Syntax::Enum(e) if is_public(&e.vis) => add(path(&e.ident), false),
            Syntax::Union(u) if is_public(&u.vis) => add(path(&u.ident), false),
            Syntax::Impl(i) if i.trait_.is_none() => {
                let Type::Path(of) = &*i.self_ty else {
                    bail!("an impl of something that has no name");
                };
                let Some(of) = of.path.segments.last() else {
                    bail!("an impl of something that has no name");
                };
                for part in i.items {
                    match part {
                        syn::ImplItem::Const(c) if is_public(&c.vis) => {
                            add(path(&format!("{}::{}", of.ident, c.ident)), false);
                        }
                        syn::ImplItem::Macro(_) => bail!("a macro in an impl of {}", of.ident),
                        _ => {}
                    }
                }
            }
            Syntax::Mod(m) if m.content.is_some() && !m.attrs.iter().any(is_test) => {
                bail!("a module in a module is not known here: {}", m.ident);
            }
            Syntax::Macro(m) => {
                if let Some(name) = &m.ident {
                    if !DEFINED.iter().any(|d| name == d) {
                        bail!("macro_rules! {name} is not known here: it may declare items");
                    }
                    continue;
                }
                let tokens = m.mac.tokens;
                match m.mac.path.segments.last().map(|s| s.ident.to_string()) {
                    Some(name) if name == "abi_consts" => {
                        for name in syn::parse2::<Consts>(tokens)?.0 {
                            add(path(&name), true);
                        }
                    }
                    Some(name) if name == "abi_newtype" => {
                        let newtype: Newtype = syn::parse2(tokens)?;
                        for name in newtype.names {
                            add(path(&format!("{}::{name}", newtype.of)), true);
                        }
                    }
                    Some(name) if name == "abi_structs" => {
                        for (name, fields) in syn::parse2::<Structs>(tokens)?.0 {
                            for field in fields {
                                add(path(&format!("{name}.{field}")), true);
                            }
                            add(path(&name), true);
                        }
                    }
                    Some(name) if name == "bitflags" => {
                        let flags: Flags = syn::parse2(tokens)?;
                        for name in flags.names {
                            add(path(&format!("{}::{name}", flags.of)), false);
                        }
                    }
                    Some(name) if DECLARE_NOTHING.contains(&name.as_str()) => {}
                    name => bail!("the macro {name:?} is not known here: it may declare items"),
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_public(vis: &syn::Visibility) -> bool {
    matches!(vis, syn::Visibility::Public(_))
}

fn is_test(attr: &Attribute) -> bool {
    attr.path().is_ident("cfg")
        && attr
            .parse_args::<Ident>()
            .is_ok_and(|condition| condition == "test")
}

/// `T { NAME = expression, .. } ..`
struct Consts(Vec<Ident>);

impl Parse for Consts {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let mut names = Vec::new();
        while !input.is_empty() {
            input.parse::<Ident>()?;
            let group;
            braced!(group in input);
            while !group.is_empty() {
                group.call(Attribute::parse_outer)?;
                names.push(group.parse()?);
                group.parse::<Token![=]>()?;
                group.parse::<syn::Expr>()?;
                group.parse::<Token![,]>()?;
            }
        }
        Ok(Self(names))
    }
}

/// `pub struct Name(T) { NAME = value, "c"; .. }`
struct Newtype {
    of: Ident,
    names: Vec<Ident>,
}

impl Parse for Newtype {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        input.call(Attribute::parse_outer)?;
        input.parse::<Token![pub]>()?;
        input.parse::<Token![struct]>()?;
        let of = input.parse()?;
        let (repr, body);
        parenthesized!(repr in input);
        repr.parse::<Ident>()?;
        braced!(body in input);
        let mut names = Vec::new();
        while !body.is_empty() {
            body.call(Attribute::parse_outer)?;
            names.push(body.parse()?);
            body.parse::<Token![=]>()?;
            body.parse::<syn::Expr>()?;
            body.parse::<Token![,]>()?;
            body.parse::<Lit>()?;
            body.parse::<Token![;]>()?;
        }
        Ok(Self { of, names })
    }
}

/// `pub struct Name("c", size, versions) { field ["c"]: T = offset, .. } ..`
struct Structs(Vec<(Ident, Vec<Ident>)>);

impl Parse for Structs {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let mut structs = Vec::new();
        while !input.is_empty() {
            input.call(Attribute::parse_outer)?;
            input.parse::<Token![pub]>()?;
            input.parse::<Token![struct]>()?;
            let name = input.parse()?;
            let (head, body);
            parenthesized!(head in input);
            head.parse::<proc_macro2::TokenStream>()?;
            braced!(body in input);
            let mut fields = Vec::new();
            while !body.is_empty() {
                body.call(Attribute::parse_outer)?;
                fields.push(body.parse()?);
                if body.peek(syn::token::Bracket) {
                    let c;
                    bracketed!(c in body);
                    c.parse::<Lit>()?;
                }
                body.parse::<Token![:]>()?;
                body.parse::<Type>()?;
                if body.peek(Token![=]) {
                    body.parse::<Token![=]>()?;
                    body.parse::<Lit>()?;
                }
                body.parse::<Token![,]>()?;
            }
            structs.push((name, fields));
        }
        Ok(Self(structs))
    }
}

/// `pub struct Name: T { const NAME = expression; .. }`
struct Flags {
    of: Ident,
    names: Vec<Ident>,
}

impl Parse for Flags {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        input.call(Attribute::parse_outer)?;
        input.parse::<Token![pub]>()?;
        input.parse::<Token![struct]>()?;
        let of = input.parse()?;
        input.parse::<Token![:]>()?;
        input.parse::<Type>()?;
        let body;
        braced!(body in input);
        let mut names = Vec::new();
        while !body.is_empty() {
            body.call(Attribute::parse_outer)?;
            body.parse::<Token![const]>()?;
            names.push(body.parse()?);
            body.parse::<Token![=]>()?;
            body.parse::<syn::Expr>()?;
            body.parse::<Token![;]>()?;
        }
        Ok(Self { of, names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        of_module("m", text)
            .unwrap()
            .into_iter()
            .map(|i| format!("{}{}", i.path, if i.tabled { "" } else { " alone" }))
            .collect()
    }

    #[test]
    fn what_macros_declare_is_found() {
        let text = r#"
            abi_consts! { u32 { /// One.
                A = 1 << 3, B = 2, } u8 { C = u8::MAX, } }
            abi_newtype! { /// Doc.
                pub struct N(i16) { X = -1, "C_X"; Y = 2, ""; } }
            abi_structs! {
                /// Doc.
                pub struct S("struct s", 8, 0x15..=0x16) { a: u32 = 0, kind ["type"]: [u8; 4], }
                pub struct T("", 0) { }
            }
            bitflags::bitflags! { pub struct F: u32 { const G = A; } }
        "#;
        let want = [
            "m::A",
            "m::B",
            "m::C",
            "m::N::X",
            "m::N::Y",
            "m::S.a",
            "m::S.kind",
            "m::S",
            "m::T",
            "m::F::G alone",
        ];
        assert_eq!(paths(text), want);
    }

    #[test]
    fn what_is_declared_beside_the_macros_is_found() {
        let text = "pub const A: u32 = 1; const PRIVATE: u32 = 2; const _: () = ();
            #[repr(C)] pub struct S { a: u8 } pub enum E { X } pub union U { a: u8 }
            impl S { pub const B: u8 = 1; const P: u8 = 2; pub fn f() {} }
            #[cfg(test)] mod tests { pub const T: u8 = 1; }";
        let want = [
            "m::A alone",
            "m::S alone",
            "m::E alone",
            "m::U alone",
            "m::S::B alone",
        ];
        assert_eq!(paths(text), want);
    }

    #[test]
    fn a_macro_that_is_not_known_is_refused() {
        assert!(of_module("m", "more_consts! { A = 1 }").is_err());
        assert!(of_module("m", "macro_rules! more { () => {} }").is_err());
    }
}
