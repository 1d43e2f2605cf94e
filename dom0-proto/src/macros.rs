//! The macros by which every module declares its constants, newtypes and structures.
//!
//! One declaration yields the Rust item, its compile-time assertions, and a row in a table that
//! [`crate::layout`] collects, so that no item can exist that the check against the C headers misses.

/// Declares plain integer constants by type, and the module's `ABI_CONSTS` table of them.
macro_rules! abi_consts {
    ($( $t:ident { $( $(#[$m:meta])* $name:ident = $v:expr, )* } )*) => {
        $( $( $(#[$m])* pub const $name: $t = $v; )* )*

        #[doc(hidden)]
        pub const ABI_CONSTS: &[$crate::layout::AbiConst] = &[
            $( $( $crate::layout::AbiConst {
                item: concat!(module_path!(), "::", stringify!($name)),
                name: stringify!($name),
                value: $name as i64,
                bits: $t::BITS,
            }, )* )*
        ];
    };
}

/// Declares an open newtype over an integer: any value is legal, the known ones are constants.
macro_rules! abi_newtype {
    (
        $(#[$tm:meta])*
        pub struct $name:ident($t:ident) {
            $( $(#[$m:meta])* $k:ident = $v:literal, $c:literal; )*
        }
    ) => {
        $(#[$tm])*
        #[repr(transparent)]
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        pub struct $name(pub $t);

        impl $name {
            $( $(#[$m])* #[doc = ""] #[doc = concat!("C: `", $c, "`.")] pub const $k: Self = Self($v); )*

            #[doc(hidden)]
            pub const ABI_CONSTS: &[$crate::layout::AbiConst] = &[
                $( $crate::layout::AbiConst {
                    item: concat!(
                        module_path!(), "::", stringify!($name), "::", stringify!($k),
                    ),
                    name: $c,
                    value: Self::$k.0 as i64,
                    bits: $t::BITS,
                }, )*
            ];

            /// The Rust spelling of a known value.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $( $v => Some(stringify!($k)), )*
                    _ => None,
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }
    };
}

/// The C spelling of a field: the one given, or the Rust name.
macro_rules! c_name {
    ($f:ident) => {
        stringify!($f)
    };
    ($f:ident $c:literal) => {
        $c
    };
}

/// The interface versions a layout belongs to: those given, or all.
macro_rules! versions {
    () => {
        (0, u32::MAX)
    };
    ($lo:literal $hi:literal) => {
        ($lo, $hi)
    };
}

/// Declares ABI structures and the module's `ABI_STRUCTS` table of them.
///
/// `pub struct Name("C type", size) { field: Type = offset, .. }`. The C type may be empty where C
/// has no name for the part; a third argument `0x15..=0x16` limits it to control interface versions;
/// `["c.path"]` after a field gives the C name where it differs; the offset may be left out.
/// Fields whose names begin with `_pad` are padding.
macro_rules! abi_structs {
    ($(
        $(#[$sm:meta])*
        pub struct $name:ident($c:literal, $size:literal $(, $lo:literal ..= $hi:literal)?) {
            $( $(#[$fm:meta])* $f:ident $([$cf:literal])? : $t:ty $(= $off:literal)?, )*
        }
    )*) => {
        $(
            $(#[$sm])*
            #[doc = ""]
            #[doc = concat!("C: `", $c, "`, ", stringify!($size), " bytes.")]
            #[repr(C)]
            #[derive(
                Clone, Copy, Debug, PartialEq, Eq,
                zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
            )]
            pub struct $name {
                $(
                    $(#[$fm])*
                    #[doc = ""]
                    #[doc = concat!("C: `", c_name!($f $($cf)?), "`.")]
                    pub $f: $t,
                )*
            }

            const _: () = {
                assert!(size_of::<$name>() == $size);
                $( $( assert!(core::mem::offset_of!($name, $f) == $off); )? )*
            };
        )*

        #[doc(hidden)]
        pub const ABI_STRUCTS: &[$crate::layout::AbiStruct] = &[
            $( $crate::layout::AbiStruct {
                item: concat!(module_path!(), "::", stringify!($name)),
                c_type: $c,
                size: $size,
                versions: versions!($($lo $hi)?),
                fields: &[
                    $( $crate::layout::AbiField {
                        field: stringify!($f),
                        name: c_name!($f $($cf)?),
                        offset: core::mem::offset_of!($name, $f),
                        size: size_of::<$t>(),
                    }, )*
                ],
            }, )*
        ];
    };
}

/// Gives an operation whose arguments are a union (`u`) typed access to it.
macro_rules! payload_methods {
    ($name:ident, $len:expr) => {
        impl $name {
            /// The payload as one of its types. Which one, the operation says.
            #[must_use]
            pub fn payload<T: zerocopy::FromBytes>(&self) -> T {
                const { assert!(size_of::<T>() <= $len) };
                match T::read_from_prefix(&self.u) {
                    Ok((payload, _rest)) => payload,
                    // Too short a union: excluded above, at compile time.
                    Err(_) => T::new_zeroed(),
                }
            }

            /// Writes a payload back; what lies behind it in the union stays.
            pub fn set_payload<T: zerocopy::IntoBytes + zerocopy::Immutable>(
                &mut self,
                payload: &T,
            ) {
                const { assert!(size_of::<T>() <= $len) };
                // Too short a union is excluded above, at compile time.
                let _ = payload.write_to_prefix(&mut self.u);
            }
        }
    };
}
